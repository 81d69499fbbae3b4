"""From what the user passes (named parameters, prefixes, groups, ratios) to checked blocks, or to sizes of windows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from badam.blocks.names import Block, ParameterInfo, belongs, rows_of
from badam.blocks.partition import layer_paths, layer_stacks, partition_parameters, split_by_rows
from badam.errors import InputError, near_matches
from badam.optim.window_entries import window_size
from badam.tensors.dtensor import shape_of

NamedParameters = list[tuple[str, nn.Parameter]]
BlockSpec = Block | str | Sequence[str]

_FROZEN_HERE = "_frozen_by_badam"


@dataclass(frozen=True, slots=True)
class BlocksOfModel:
    """A model's parameters and its blocks, checked against each other."""

    named_parameters: NamedParameters
    frozen: set[str]  # names that the user froze
    trainable: NamedParameters  # neither frozen nor unknown to the base optimizer
    blocks: tuple[Block, ...]
    always: list[str]  # prefixes that are active besides every block


def blocks_of_model(
    named_parameters: Iterable[tuple[str, Any]],
    specs: Sequence[BlockSpec] | None,
    optimized: Iterable[Any],
    *,
    always: Sequence[str] = (),
    include_embedding: bool = False,
    include_lm_head: bool = False,
    max_parameters: int | None = None,
) -> BlocksOfModel:
    """Find or check the blocks of a model.

    Args:
        named_parameters: the model's; a generator is read to its end.
        specs: the blocks as the user wrote them; None finds the layers.
        optimized: the parameters of the base optimizer.
        always: prefixes that are active besides every block.
        include_embedding: also make a block of the embedding, where blocks are found.
        include_lm_head: also make a block of the output projection, where blocks are found.
        max_parameters: split blocks with more entries than this by rows.

    Raises:
        InputError: for a prefix that matches nothing, or a block that would train nothing.
    """
    distinct = distinct_parameters(named_parameters)
    frozen = _frozen_by_user(distinct)
    known = {id(parameter) for parameter in optimized}
    trainable = [(name, parameter) for name, parameter in distinct if id(parameter) in known and name not in frozen]
    if specs is None:
        blocks = inferred_blocks(distinct, frozen, include_embedding=include_embedding, include_lm_head=include_lm_head)
    else:
        blocks = given_blocks(specs, distinct)
    if max_parameters is not None:
        infos = parameter_infos(distinct)
        blocks = tuple(part for block in blocks for part in split_by_rows(block, infos, max_parameters))
    check_prefixes(always, distinct)
    check_trainable(blocks, always, trainable)
    return BlocksOfModel(distinct, frozen, trainable, blocks, list(always))


def freeze(parameter: nn.Parameter) -> None:
    """Stop training ``parameter``, and mark it as frozen by an optimizer and not by the user."""
    parameter.requires_grad_(False)
    parameter.grad = None
    setattr(parameter, _FROZEN_HERE, True)


def _frozen_by_user(named_parameters: NamedParameters) -> set[str]:
    """Names of parameters that are frozen and were not frozen by an earlier optimizer on the same model."""
    return {
        name
        for name, parameter in named_parameters
        if not parameter.requires_grad and not getattr(parameter, _FROZEN_HERE, False)
    }


def distinct_parameters(named_parameters: Iterable[tuple[str, Any]]) -> NamedParameters:
    """Named parameters as a list, each tensor once under its first name; a generator is read to its end."""
    seen: set[int] = set()
    distinct = []
    for name, parameter in named_parameters:
        if id(parameter) not in seen:
            seen.add(id(parameter))
            distinct.append((name, parameter))
    if not distinct:
        raise InputError(
            "named_parameters_list holds no parameters.",
            advice="Pass list(model.named_parameters()); a generator that was read before is empty.",
        )
    return distinct


def parameter_infos(named_parameters: NamedParameters) -> list[ParameterInfo]:
    """Names and shapes, for the modules that know no torch."""
    return [ParameterInfo(name, shape_of(parameter)) for name, parameter in named_parameters]


def given_blocks(specs: Sequence[BlockSpec], named_parameters: NamedParameters) -> tuple[Block, ...]:
    """Blocks as the user wrote them: lists of prefixes, single prefixes, or blocks of a partition.

    Raises:
        InputError: if there are none, or a prefix matches no parameter.
    """
    if not specs or isinstance(specs, str):
        raise InputError(
            f"block_prefix_list is {specs!r}, which holds no blocks.",
            advice='Pass one list of prefixes per block, such as [["model.layers.0"], ["model.layers.1"]].',
        )
    blocks = []
    for spec in specs:
        prefixes = spec.prefixes if isinstance(spec, Block) else (spec,) if isinstance(spec, str) else tuple(spec)
        name = spec.name if isinstance(spec, Block) else " + ".join(prefix.rstrip(".") for prefix in prefixes)
        check_prefixes(prefixes, named_parameters)
        blocks.append(Block(name, prefixes, _numel(prefixes, named_parameters)))
    return tuple(blocks)


def inferred_blocks(
    named_parameters: NamedParameters, frozen: set[str], *, include_embedding: bool, include_lm_head: bool
) -> tuple[Block, ...]:
    """Layer blocks found from the model's structure; a stack that the user froze as a whole is left out.

    So the language layers of a model with a frozen vision tower are trained, and nothing needs to be listed by hand.
    """
    names = [name for name, _ in named_parameters]
    wholly_frozen = {
        layer
        for stack in layer_stacks(names)
        if all(name in frozen for name in names if belongs(name, stack))
        for layer in stack
    }
    blocks = partition_parameters(
        parameter_infos(named_parameters),
        "layer",
        include_embedding=include_embedding,
        include_lm_head=include_lm_head,
    )
    kept = tuple(block for block in blocks if block.name not in wholly_frozen)
    return kept or blocks


def check_prefixes(prefixes: Sequence[str], named_parameters: NamedParameters) -> None:
    """Refuse a prefix that matches nothing, naming what it may have meant."""
    for prefix in prefixes:
        if any(belongs(name, (prefix,)) for name, _ in named_parameters):
            continue
        modules = {path for name, _ in named_parameters for path in _ancestors(name)}
        close = ", ".join(near_matches(prefix, sorted(modules), limit=3))
        raise InputError(
            f"The prefix {prefix!r} matches none of the {len(named_parameters)} parameters; prefixes are compared "
            "from the start of the name, on module boundaries.",
            advice=f"Near matches: {close}." if close else None,
        )


def check_trainable(blocks: Sequence[Block], always: Sequence[str], trainable: NamedParameters) -> None:
    """Refuse a block that would train nothing, naming it."""
    for block in blocks:
        if not any(belongs(name, (*block.prefixes, *always)) for name, _ in trainable):
            raise InputError(
                f"The block {block.name!r} would train nothing: all of its parameters are frozen or are not in the "
                "base optimizer.",
                advice="Leave it out of block_prefix_list, or set requires_grad and pass its parameters to the base "
                "optimizer.",
            )


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _numel(prefixes: Sequence[str], named_parameters: Iterable[tuple[str, Tensor]]) -> int:
    total = 0
    for name, parameter in named_parameters:
        if belongs(name, prefixes):
            rows = rows_of(name, prefixes)
            whole, *rest = shape_of(parameter) or (1,)
            total += (whole if rows is None else len(range(whole)[rows[0] : rows[1]])) * math.prod(rest)
    return total


class WindowSizes:
    """How many entries of each parameter are trained at a time.

    Args:
        ratio: share of a parameter, above 0 and at most 1.
        preserve_threshold: parameters with fewer entries are trained as a whole.
        special: ratios by a part of the parameter's path; None stands for no special ratio.
        names: of all parameters, to check that each part occurs in one.

    Raises:
        InputError: for a ratio out of range, or a part that occurs nowhere.
    """

    def __init__(
        self, ratio: float, preserve_threshold: int, special: Mapping[str, float | None], names: Iterable[str]
    ) -> None:
        self.ratio = _checked(ratio, "update_ratio")
        self.preserve_threshold = preserve_threshold
        self.special = {
            part: _checked(value, f"param_update_ratios[{part!r}]")
            for part, value in special.items()
            if value is not None
        }
        known = list(names)
        for part in self.special:
            if not any(_occurs(part, name) for name in known):
                modules = {piece for name in known for piece in name.split(".")}
                close = ", ".join(near_matches(part, sorted(modules), limit=3))
                raise InputError(
                    f"param_update_ratios names {part!r}, which is not part of any parameter's path.",
                    advice=f"Near matches: {close}." if close else "Parts are compared on module boundaries.",
                )

    def of(self, name: str, numel: int) -> int:
        """Entries in the window of parameter ``name``."""
        if numel < self.preserve_threshold:
            return numel
        parts = [part for part in self.special if _occurs(part, name)]
        return window_size(numel, self.special[max(parts, key=len)] if parts else self.ratio)


def given_groups(param_groups: Iterable[Any]) -> list[dict[str, Any]]:
    """Parameters or groups of them, as a list of groups with lists of parameters; the caller's are not changed."""
    given: list[Any] = [param_groups] if isinstance(param_groups, Tensor | dict) else list(param_groups)
    if not given:
        raise InputError(
            "param_groups holds no parameters.",
            advice="Pass list(model.parameters()); a generator that was read before is empty.",
        )
    if not isinstance(given[0], dict):
        given = [{"params": given}]
    groups = []
    for group in given:
        parameters = group["params"]
        groups.append({**group, "params": [parameters] if isinstance(parameters, Tensor) else list(parameters)})
    return groups


def outside_parameters(
    named_parameters: list[tuple[str, nn.Parameter]], include_embedding: bool, include_lm_head: bool
) -> list[nn.Parameter]:
    """Embedding and output matrices that are not to be trained; none if the model has no layers to be outside of."""
    infos = parameter_infos(named_parameters)
    if not layer_paths(info.name for info in infos):
        return []
    wanted = _prefixes(infos, embedding=include_embedding, head=include_lm_head)
    outside = _prefixes(infos, embedding=True, head=True)
    return [p for name, p in named_parameters if belongs(name, outside) and not belongs(name, wanted)]


def _prefixes(infos: list[ParameterInfo], *, embedding: bool, head: bool) -> list[str]:
    """Prefixes of the embedding and of the output matrix, as far as they are asked for and exist."""
    found: list[str] = []
    for options in ({"include_embedding": True}, {"include_lm_head": True}):
        if (embedding and "include_embedding" in options) or (head and "include_lm_head" in options):
            try:
                blocks = partition_parameters(infos, "layer", **options)
            except InputError:  # the model has no such part
                continue
            found += [prefix for block in blocks if block.name in ("embedding", "lm_head") for prefix in block.prefixes]
    return found


def _occurs(part: str, name: str) -> bool:
    """Whether the path ``name`` holds ``part`` between module boundaries: ``layers.1`` is not in ``layers.11.bias``."""
    return f".{part.strip('.')}." in f".{name}."


def _checked(ratio: float, what: str) -> float:
    if not 0 < ratio <= 1:
        raise InputError(f"{what} is {ratio}, which is not a share of a parameter.", advice="Give a number in (0, 1].")
    return ratio

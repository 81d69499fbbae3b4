"""From what the user passes (named parameters, prefix lists, options) to checked blocks of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from badam.blocks.names import Block, ParameterInfo, belongs, rows_of
from badam.blocks.partition import layer_stacks, partition_parameters, split_by_rows
from badam.errors import InputError, near_matches
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
        blocks.append(Block(name, prefixes, _entries(prefixes, named_parameters)))
    return tuple(blocks)


def inferred_blocks(
    named_parameters: NamedParameters, frozen: set[str], *, include_embedding: bool, include_lm_head: bool
) -> tuple[Block, ...]:
    """Layer blocks found from the model's structure; a stack that the user froze as a whole is left out.

    So the language layers of a model with a frozen vision tower are trained, and nothing needs to be listed by hand.
    """
    names = [name for name, _ in named_parameters]
    still = {
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
    kept = tuple(block for block in blocks if block.name not in still)
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


def _entries(prefixes: Sequence[str], named_parameters: Iterable[tuple[str, Tensor]]) -> int:
    total = 0
    for name, parameter in named_parameters:
        if belongs(name, prefixes):
            rows = rows_of(name, prefixes)
            whole, *rest = shape_of(parameter) or (1,)
            total += (whole if rows is None else len(range(whole)[rows[0] : rows[1]])) * math.prod(rest)
    return total

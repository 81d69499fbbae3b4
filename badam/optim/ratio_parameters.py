"""From what the user passes to the ratio optimizer (groups, ratios, options) to parameters and window sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from badam.blocks.names import ParameterInfo, belongs
from badam.blocks.partition import layer_paths, partition_parameters
from badam.errors import InputError, near_matches
from badam.optim.window_entries import window_size


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
    infos = [ParameterInfo(name, tuple(parameter.shape)) for name, parameter in named_parameters]
    if not layer_paths(info.name for info in infos):
        return []
    wanted = _prefixes(infos, embedding=include_embedding, head=include_lm_head)
    every = _prefixes(infos, embedding=True, head=True)
    return [p for name, p in named_parameters if belongs(name, every) and not belongs(name, wanted)]


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

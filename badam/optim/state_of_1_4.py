"""Reading what badam 1.4 saved: its base optimizer's state over the active block, and nothing about which block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from badam.blocks.names import Block, belongs
from badam.errors import StateError

NOT_SAVED = "the block it belongs to, the order, the position in the visit, the generator and the fp32 masters"


@dataclass(frozen=True, slots=True)
class OldState:
    """The moments of one block, by parameter name, and the steps that they have had."""

    entries: dict[str, dict[str, Any]]
    steps: int


def read_state_of_1_4(
    state_dict: dict[str, Any],
    blocks: Sequence[Block],
    always: Sequence[str],
    trainable: Sequence[tuple[str, nn.Parameter]],
) -> tuple[int | None, OldState]:
    """Find the block whose parameters have the shapes of the saved moments.

    Args:
        state_dict: what 1.4's ``state_dict()`` gave.
        blocks: the blocks it may belong to.
        always: prefixes that are active besides every block.
        trainable: the parameters that may be active, in model order.

    Returns:
        The index of the block (None if none was active yet, or several have these shapes) and its state.

    Raises:
        StateError: if it fits no block, so that it comes from another model or another optimizer.
    """
    try:
        order = [index for group in state_dict["param_groups"] for index in group["params"]]
        entries = {index: state_dict["state"][index] for index in order if index in state_dict["state"]}
        shapes = {index: tuple(entry["exp_avg"].shape) for index, entry in entries.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise StateError(
            f"This is not an optimizer state of badam ({error} is missing).",
            advice="Start without it, or load it into the optimizer that wrote it.",
        ) from error
    fitting = {}
    for number, block in enumerate(blocks):
        members = _in_order_of_1_4([(n, p) for n, p in trainable if belongs(n, (*block.prefixes, *always))])
        same = len(members) == len(order) and all(
            shapes.get(index, tuple(parameter.shape)) == tuple(parameter.shape)
            for index, (_, parameter) in zip(order, members, strict=True)
        )
        if same:
            fitting[number] = [name for name, _ in members]
    if not fitting:
        raise StateError(
            f"This optimizer state has {len(order)} parameters and matches no block of this model, nor was it written "
            "by this version.",
            advice="Load it into the model and optimizer it was saved with, or start without it.",
        )
    if not entries or len(fitting) > 1:
        return None, OldState({}, 0)
    number, names = next(iter(fitting.items()))
    by_name = {name: entries[index] for index, name in zip(order, names, strict=True) if index in entries}
    return number, OldState(by_name, max(int(entry["step"]) for entry in by_name.values()))


def _in_order_of_1_4(members: list[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    """Its first group held what has no ``bias`` in its name, its second one the biases."""
    return sorted(members, key=lambda member: "bias" in member[0])

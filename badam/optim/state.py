"""The saved state of both optimizers: positions, the check that they belong to this model, and what badam 1.4 saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from badam.blocks.names import Block, belongs
from badam.blocks.schedule import BlockSchedule
from badam.errors import StateError
from badam.tensors.dtensor import shape_of

FORMAT = 2
"""Version of the saved states; those of badam 1.4, which do not say what they belong to, count as 1."""

NOT_SAVED_BY_1_4 = "the block it belongs to, the order, the position in the visit, the generator and the fp32 masters"

_START_FRESH = "Build the optimizer as the one that was saved, or start without this state."


@dataclass(frozen=True, slots=True)
class BlockProgress:
    """Of a block optimizer: position in the schedule, the masters of the visit, and what they belong to."""

    step: int
    visit: int
    steps_in_visit: int
    non_finite_steps: int
    schedule: BlockSchedule
    blocks: list[list[str]]
    active_modules: list[str]
    parameters: int
    model_digest: str
    masters: dict[str, Tensor]
    group_changes: list[list[Any]]

    def pack(self) -> dict[str, Any]:
        """Plain types and tensors, which are not copied; loads with ``weights_only=True``."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {"format": FORMAT, **fields, "schedule": asdict(self.schedule)}

    @classmethod
    def unpack(cls, saved: dict[str, Any]) -> BlockProgress:
        """What :meth:`pack` gave.

        Raises:
            StateError: if it has another format or lacks something.
        """
        fields = _fields_of(saved, cls.__slots__)
        return cls(**{**fields, "schedule": BlockSchedule(**fields["schedule"])})

    def check_against(self, here: BlockProgress) -> None:
        """Refuse a state of another model or partition.

        Raises:
            StateError: with both numbers and the first difference.
        """
        if self.model_digest != here.model_digest:
            raise StateError(
                f"The optimizer state was saved for another model: {self.parameters} parameters there, "
                f"{here.parameters} here, and their names or shapes differ.",
                advice="Load it into the model it was saved with.",
            )
        if (self.blocks, self.active_modules) != (here.blocks, here.active_modules):
            pairs = enumerate(zip(self.blocks, here.blocks, strict=False))
            shorter = min(len(self.blocks), len(here.blocks))
            different = next((index for index, (saved, own) in pairs if saved != own), shorter)
            raise StateError(
                f"The optimizer state was saved for another partition: {len(self.blocks)} blocks there, "
                f"{len(here.blocks)} here; block {different} is the first that differs.",
                advice="Build the optimizer with the blocks and active modules it was saved with.",
            )


@dataclass(frozen=True, slots=True)
class WindowProgress:
    """Of a ratio optimizer: position in the visits, the masters, and what they belong to."""

    step: int
    visit: int
    steps_in_visit: int
    non_finite_steps: int
    switch_every: int
    seed: int
    mask_mode: str
    rule: str  # class of the optimizer that runs on the masters
    windows: list[list[Any]]  # name, entries of the parameter, entries of the window, entries of a run
    masters: dict[str, Tensor]  # those that were read from the model

    def pack(self) -> dict[str, Any]:
        """Plain types and tensors, which are not copied; loads with ``weights_only=True``."""
        return {"format": FORMAT, **{name: getattr(self, name) for name in self.__slots__}}

    @classmethod
    def unpack(cls, saved: dict[str, Any]) -> WindowProgress:
        """What :meth:`pack` gave.

        Raises:
            StateError: if it has another format or lacks something.
        """
        return cls(**_fields_of(saved, cls.__slots__))

    def check_against(self, here: WindowProgress) -> None:
        """Refuse a state of another model, window size, mode or rule.

        Raises:
            StateError: with both values and the first difference.
        """
        names_there, names_here = (
            [str(window[0]) for window in self.windows],
            [str(window[0]) for window in here.windows],
        )
        if names_there != names_here:
            only = sorted(set(names_here) ^ set(names_there)) or names_there
            raise StateError(
                f"The optimizer state was saved for another model: {len(names_there)} parameters there, "
                f"{len(names_here)} here; the first that differs is {only[0]}.",
                advice=_START_FRESH,
            )
        for option in ("mask_mode", "rule"):
            there, own = getattr(self, option), getattr(here, option)
            if there != own:
                raise StateError(
                    f"The optimizer state was saved with {option} {there!r}; this optimizer has {own!r}.",
                    advice=_START_FRESH,
                )
        for there, own in zip(self.windows, here.windows, strict=True):
            if list(there) != own:
                raise StateError(
                    f"The optimizer state was saved for other windows: {own[0]} trains {there[2]} of {there[1]} "
                    f"entries in runs of {there[3]} there, {own[2]} of {own[1]} in runs of {own[3]} here.",
                    advice=_START_FRESH,
                )


def check_group_sizes(saved: Sequence[Mapping[str, Any]], here: Sequence[int]) -> None:
    """Refuse a state whose parameters are grouped otherwise: positions in it would mean other parameters.

    Args:
        saved: the groups of the state.
        here: parameters in each group of the optimizer that is to load it.

    Raises:
        StateError: with the sizes of both groupings.
    """
    there = [len(group["params"]) for group in saved]
    if there != list(here):
        raise StateError(
            f"The optimizer state was saved with parameter groups of {there} parameters; here they have {list(here)}.",
            advice="Group the parameters as they were grouped when the state was saved.",
        )


def model_digest(named_parameters: Sequence[tuple[str, nn.Parameter]]) -> str:
    """sha256 of the names and shapes of all parameters."""
    content = [(name, list(shape_of(parameter))) for name, parameter in named_parameters]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _fields_of(saved: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    if saved.get("format") != FORMAT:
        raise StateError(f"The optimizer state has format {saved.get('format')!r}; this version reads {FORMAT}.")
    try:
        return {name: saved[name] for name in names}
    except KeyError as error:
        raise StateError(f"The optimizer state lacks {error}; it was not saved completely.") from error


# What badam 1.4 saved: its base optimizer's state over the active block, and nothing about which block.


@dataclass(frozen=True, slots=True)
class BlockStateOf14:
    """The moments of one block, by parameter name, and the steps that they have had."""

    moments: dict[str, dict[str, Any]]
    steps: int


def read_block_state_of_1_4(
    state_dict: dict[str, Any],
    blocks: Sequence[Block],
    always: Sequence[str],
    trainable: Sequence[tuple[str, nn.Parameter]],
) -> tuple[int | None, BlockStateOf14]:
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
        moments = {index: state_dict["state"][index] for index in order if index in state_dict["state"]}
        shapes = {index: tuple(moment["exp_avg"].shape) for index, moment in moments.items()}
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
    if not moments or len(fitting) > 1:
        return None, BlockStateOf14({}, 0)
    number, names = next(iter(fitting.items()))
    by_name = {name: moments[index] for index, name in zip(order, names, strict=True) if index in moments}
    return number, BlockStateOf14(by_name, max(int(moment["step"]) for moment in by_name.values()))


def _in_order_of_1_4(members: list[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    """Its first group held what has no ``bias`` in its name, its second one the biases."""
    return sorted(members, key=lambda member: "bias" in member[0])


def read_ratio_options_of_1_4(state_dict: dict[str, Any], group_sizes: list[int]) -> list[dict[str, Any]]:
    """The groups' options from a state that badam 1.4's ratio optimizer wrote.

    Raises:
        StateError: if it is not one, or its groups are others.
    """
    groups, state = state_dict.get("param_groups", []), state_dict.get("state", {})
    moments = [moment for moment in state.values() if moment]
    keys = {"step", "exp_avg", "exp_avg_sq"}
    known = all(set(moment) == keys and moment["exp_avg"].dim() == 1 for moment in moments)
    if not known or not groups or any("amsgrad" in group for group in groups):
        raise StateError(
            "This optimizer state was not written by BlockOptimizerRatio.",
            advice="Load the state of a ratio optimizer, or start without one.",
        )
    check_group_sizes(groups, group_sizes)
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]

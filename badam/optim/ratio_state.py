"""The position of a ratio run as it is saved, and the check that a state belongs to this model and its windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from badam.errors import StateError
from badam.optim.saved_state import check_group_sizes, read_fields, with_format

_KEYS_OF_1_4 = {"step", "exp_avg", "exp_avg_sq"}
_START_FRESH = "Build the optimizer as the one that was saved, or start without this state."


@dataclass(frozen=True, slots=True)
class WindowProgress:
    """Position in the visits, the masters, and what they belong to."""

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
        return with_format({name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def unpack(cls, saved: dict[str, Any]) -> WindowProgress:
        """What :meth:`pack` gave.

        Raises:
            StateError: if it has another format or lacks something.
        """
        return cls(**read_fields(saved, cls.__slots__))

    def check_against(self, here: WindowProgress) -> None:
        """Refuse a state of another model, window size, mode or rule.

        Raises:
            StateError: with both values and the first difference.
        """
        names_there, names_here = [str(entry[0]) for entry in self.windows], [str(entry[0]) for entry in here.windows]
        if names_there != names_here:
            only = sorted(set(names_here) ^ set(names_there)) or names_there
            raise StateError(
                f"The optimizer state was saved for another model: {len(names_there)} parameters there, "
                f"{len(names_here)} here; the first that differs is {only[0]}.",
                advice=_START_FRESH,
            )
        for option in ("mask_mode", "rule"):
            there, value = getattr(self, option), getattr(here, option)
            if there != value:
                raise StateError(
                    f"The optimizer state was saved with {option} {there!r}; this optimizer has {value!r}.",
                    advice=_START_FRESH,
                )
        for there, own in zip(self.windows, here.windows, strict=True):
            if list(there) != own:
                raise StateError(
                    f"The optimizer state was saved for other windows: {own[0]} trains {there[2]} of {there[1]} "
                    f"entries in runs of {there[3]} there, {own[2]} of {own[1]} in runs of {own[3]} here.",
                    advice=_START_FRESH,
                )


def options_of_1_4(state_dict: dict[str, Any], group_sizes: list[int]) -> list[dict[str, Any]]:
    """The groups' options from a state that badam 1.4's ratio optimizer wrote.

    Raises:
        StateError: if it is not one, or its groups are others.
    """
    groups, state = state_dict.get("param_groups", []), state_dict.get("state", {})
    entries = [entry for entry in state.values() if entry]
    known = all(set(entry) == _KEYS_OF_1_4 and entry["exp_avg"].dim() == 1 for entry in entries)
    if not known or not groups or any("amsgrad" in group for group in groups):
        raise StateError(
            "This optimizer state was not written by BlockOptimizerRatio.",
            advice="Load the state of a ratio optimizer, or start without one.",
        )
    check_group_sizes(groups, group_sizes)
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]

"""What a BlockOptimizerRatio saves, and how it is checked and put back."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from badam.errors import StateError

if TYPE_CHECKING:
    from badam.ratio_optimizer import BlockOptimizerRatio

FORMAT = 2
"""Version of the saved state; badam 1.4, which did not save where its windows were, counts as 1."""

_MINE = "badam_ratio"
_KEYS_OF_1_4 = {"step", "exp_avg", "exp_avg_sq"}


def pack_state(optimizer: BlockOptimizerRatio) -> dict[str, Any]:
    """The state of ``optimizer`` in plain types and tensors, which are not copied."""
    return {
        **optimizer.own_state_dict(),
        _MINE: {
            "format": FORMAT,
            "step": optimizer.global_step,
            "visit": optimizer.visit,
            "steps_in_visit": optimizer.steps_in_visit,
            "non_finite_steps": optimizer.non_finite_steps,
            "switch_every": optimizer.switch_every,
            "mask_mode": optimizer.mask_mode,
            "seed": optimizer.seed,
            "rule": _rule(optimizer),
            "windows": [[window.name, window.numel, window.size] for window in optimizer.windows],
            "masters": {window.name: window.master.detach() for window in optimizer.windows if window.is_loaded},
        },
    }


def unpack_state(optimizer: BlockOptimizerRatio, state_dict: dict[str, Any]) -> None:
    """Put ``state_dict`` into ``optimizer``: checked first, so that a refused state changes nothing."""
    own = state_dict.get(_MINE)
    if own is None:
        _load_from_1_4(optimizer, state_dict)
        return
    _check(optimizer, own, state_dict["param_groups"])
    optimizer.seed = own["seed"]
    optimizer.switch_every = own["switch_every"]
    optimizer.global_step = own["step"]
    optimizer.non_finite_steps = own["non_finite_steps"]
    optimizer.go_to(own["visit"], own["steps_in_visit"])
    for window in optimizer.windows:
        if window.name in own["masters"]:
            window.adopt_master(own["masters"][window.name])
    optimizer.load_own_state_dict(
        {
            "state": tree_map_only(Tensor, torch.clone, state_dict["state"]),
            "param_groups": state_dict["param_groups"],
        }
    )


def _check(optimizer: BlockOptimizerRatio, own: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """Refuse a state of another format, model, window size, mode, rule or grouping."""
    if own["format"] != FORMAT:
        raise StateError(f"The optimizer state has format {own['format']}; this version reads {FORMAT}.")
    here = [[window.name, window.numel, window.size] for window in optimizer.windows]
    there = [list(entry) for entry in own["windows"]]
    if here != there:
        names_here, names_there = [str(entry[0]) for entry in here], [str(entry[0]) for entry in there]
        if names_here != names_there:
            only = sorted(set(names_here) ^ set(names_there)) or names_there
            what = f"{len(there)} parameters there, {len(here)} here; the first that differs is {only[0]}"
        else:
            a, b = next((a, b) for a, b in zip(there, here, strict=True) if a != b)
            what = f"{a[0]} trains {a[2]} of {a[1]} entries there, {b[2]} of {b[1]} here"
        raise StateError(
            f"The optimizer state was saved for another model or other ratios: {what}.",
            advice="Build the optimizer as the one that was saved, or start without this state.",
        )
    for option, value in (("mask_mode", optimizer.mask_mode), ("rule", _rule(optimizer))):
        if own[option] != value:
            raise StateError(
                f"The optimizer state was saved with {option} {own[option]!r}; this optimizer has {value!r}.",
                advice="Build the optimizer as the one that was saved, or start without this state.",
            )
    sizes_there = [len(group["params"]) for group in groups]
    sizes_here = [len(group["params"]) for group in optimizer.param_groups]
    if sizes_there != sizes_here:
        raise StateError(
            f"The optimizer state was saved with groups of {sizes_there} trained parameters; here they have "
            f"{sizes_here}.",
            advice="Group the parameters as they were grouped when the state was saved.",
        )


def _load_from_1_4(optimizer: BlockOptimizerRatio, state_dict: dict[str, Any]) -> None:
    """Take the groups' options from a state that badam 1.4 wrote, or refuse what is not one."""
    groups, state = state_dict.get("param_groups", []), state_dict.get("state", {})
    entries = [entry for entry in state.values() if entry]
    known = all(set(entry) == _KEYS_OF_1_4 and entry["exp_avg"].dim() == 1 for entry in entries)
    sizes = [len(group["params"]) for group in groups]
    if not known or not groups or any("amsgrad" in group for group in groups) or optimizer.base_optimizer is not None:
        raise StateError(
            "This optimizer state was not written by BlockOptimizerRatio.",
            advice="Load the state of a ratio optimizer, or start without one.",
        )
    if sizes != optimizer.given_group_sizes:
        raise StateError(
            f"The optimizer state has parameter groups of {sizes} parameters; here they have "
            f"{optimizer.given_group_sizes}.",
            advice="Group the parameters as they were grouped when the state was saved.",
        )
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})
    warnings.warn(
        "Loaded the groups' options of a state of badam 1.4. It does not hold the step, the windows' positions or fp32 "
        "masters, so its moments belong to unknown entries: training starts with the first windows and fresh moments.",
        stacklevel=4,
    )


def _rule(optimizer: BlockOptimizerRatio) -> str:
    return "AdamW" if optimizer.base_optimizer is None else type(optimizer.base_optimizer).__name__

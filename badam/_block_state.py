"""What a BlockOptimizer saves, and how it is checked and put back."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from badam.errors import StateError
from badam.schedule import BlockSchedule

if TYPE_CHECKING:
    from badam.block_optimizer import BlockOptimizer

FORMAT = 2
"""Version of the saved state; badam 1.4, which wrote only its base optimizer's state, counts as 1."""


def pack_state(optimizer: BlockOptimizer) -> dict[str, Any]:
    """The state of ``optimizer`` in plain types and tensors, which are not copied."""
    base, members = optimizer.base_state_dict()
    position = _positions(optimizer)
    groups, taken = [], 0
    for group, saved in zip(optimizer.param_groups, base["param_groups"], strict=True):
        groups.append({**saved, "params": list(range(taken, taken + len(group["params"])))})
        taken += len(group["params"])
    return {
        "state": {position[id(members[index].parameter)]: entry for index, entry in base["state"].items()},
        "param_groups": groups,
        "badam": {
            "format": FORMAT,
            "step": optimizer.global_step,
            "visit": optimizer.visit,
            "steps_in_visit": optimizer.steps_in_visit,
            "non_finite_steps": optimizer.non_finite_steps,
            "schedule": asdict(optimizer.schedule),
            "block": optimizer.current_block.name,
            "blocks": optimizer.block_prefix_list,
            "active_modules": list(optimizer.active_modules),
            "parameters": len(optimizer.named_parameters_list),
            "model_digest": model_digest(optimizer),
            "masters": dict(optimizer.masters),
        },
    }


def unpack_state(optimizer: BlockOptimizer, state_dict: dict[str, Any]) -> None:
    """Put ``state_dict`` into ``optimizer``: checked first, so that a refused state changes nothing."""
    own = state_dict.get("badam")
    if own is None:
        raise StateError("This optimizer state was not written by BlockOptimizer.")
    _check(optimizer, own)
    _check_groups(optimizer, state_dict["param_groups"])
    schedule = BlockSchedule(**own["schedule"])
    optimizer.restart_visit(schedule, own["visit"], own["steps_in_visit"])
    optimizer.global_step = own["step"]
    optimizer.non_finite_steps = own["non_finite_steps"]
    by_name = {member.name: member for member in optimizer.active_parameters}
    for name, master in own["masters"].items():
        by_name[name].adopt_master(_copy(master, by_name[name].parameter))
    load_base_state(optimizer, state_dict["state"], state_dict["param_groups"])
    optimizer.announce_switch()


def load_base_state(optimizer: BlockOptimizer, state: dict[int, Any], groups: list[dict[str, Any]]) -> None:
    """Give the base optimizer its hyperparameters and the state of the active parameters that it was saved for."""
    position = _positions(optimizer)
    members = {position[id(member.parameter)]: member for member in optimizer.active_parameters}
    optimizer.load_base_state_dict(
        {members[index]: _fresh(entry) for index, entry in state.items()},
        [{key: value for key, value in group.items() if key != "params"} for group in groups],
    )


def model_digest(optimizer: BlockOptimizer) -> str:
    """sha256 of names and shapes of all parameters."""
    content = [(name, list(parameter.shape)) for name, parameter in optimizer.named_parameters_list]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _check(optimizer: BlockOptimizer, own: dict[str, Any]) -> None:
    """Refuse a state of another format, model, partition or grouping."""
    if own["format"] != FORMAT:
        raise StateError(f"The optimizer state has format {own['format']}; this version reads {FORMAT}.")
    blocks = optimizer.block_prefix_list
    if own["blocks"] != blocks:
        different = next(
            (index for index, (a, b) in enumerate(zip(own["blocks"], blocks, strict=False)) if a != b),
            min(len(blocks), len(own["blocks"])),
        )
        raise StateError(
            f"The optimizer state was saved for another partition: {len(own['blocks'])} blocks there, {len(blocks)} "
            f"here; the first difference is block {different}.",
            advice="Build the optimizer with the blocks it was saved with, or start without this state.",
        )
    if own["model_digest"] != model_digest(optimizer) or own["active_modules"] != optimizer.active_modules:
        raise StateError(
            f"The optimizer state was saved for another model: {own['parameters']} parameters there, "
            f"{len(optimizer.named_parameters_list)} here, and names, shapes or always-active modules differ.",
            advice="Load it into the model it was saved with.",
        )


def _check_groups(optimizer: BlockOptimizer, saved: list[dict[str, Any]]) -> None:
    """Refuse a state whose parameters are grouped otherwise: positions in it would mean other parameters."""
    there = [len(group["params"]) for group in saved]
    here = [len(group["params"]) for group in optimizer.param_groups]
    if there != here:
        raise StateError(
            f"The optimizer state was saved with parameter groups of {there} parameters; here they have {here}.",
            advice="Group the base optimizer's parameters as they were grouped when the state was saved.",
        )


def _positions(optimizer: BlockOptimizer) -> dict[int, int]:
    """Position of each parameter in the user's groups, counted through, by identity."""
    every = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return {id(parameter): index for index, parameter in enumerate(every)}


def _copy(saved: Tensor, parameter: Tensor) -> Tensor:
    """A copy on the parameter's device that shares no memory with the saved state."""
    return saved.detach().to(device=parameter.device, dtype=torch.float32, copy=True)


def _fresh(entry: Any) -> Any:
    """A state entry whose tensors share no memory with the saved ones, so that two optimizers can continue from it."""
    if isinstance(entry, Tensor):
        return entry.clone()
    if isinstance(entry, dict):
        return {key: _fresh(value) for key, value in entry.items()}
    if type(entry) in (list, tuple):
        return type(entry)(_fresh(value) for value in entry)
    return entry

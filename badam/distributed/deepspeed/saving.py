"""Checkpoints of ZeRO-3 runs: DeepSpeed's own, or a portable one, and where in which visit they were taken.

DeepSpeed reads a checkpoint into the parameters that are trainable when it is called, so the block of the checkpoint
has to be active before. Its partitions are those of a number of processes, and only so many can read them. The portable
form is whole: weights, and the active block's masters and moments, which are all that block-coordinate training keeps.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from shutil import disk_usage
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from badam.distributed.deepspeed.adapter import ZeroThree
from badam.distributed.deepspeed.position import check_number, read_position, write_position
from badam.errors import InputError, StateError, in_one_line
from badam.optim.base import plain_options
from badam.optim.block import BlockOptimizer
from badam.units import format_bytes

PORTABLE = "state.pt"


def save_zero3_checkpoint(
    engine: Any,
    optimizer: BlockOptimizer,
    directory: str | os.PathLike[str],
    tag: str | None = None,
    *,
    portable: bool = False,
) -> Path:
    """Write a checkpoint, and the position last: with it the checkpoint is whole. Collective.

    Args:
        engine: what ``deepspeed.initialize`` returned first.
        optimizer: the block optimizer inside.
        directory: for all checkpoints of the run.
        tag: name of this one; by default it names the step.
        portable: for any number of processes to read. The first process writes it, and holds all weights in host
            memory meanwhile; schedulers and loss scales are not in it. Otherwise ``engine.save_checkpoint`` writes.

    Returns:
        The checkpoint's own directory.

    Raises:
        OSError: in all processes, if the first could not write the portable form; nothing of it is left.
    """
    tag = tag or f"global_step{optimizer.global_step}"
    target = Path(directory) / tag
    if portable:
        state = {"weights": gathered_weights(engine.module), "active": _gathered_states(optimizer)}
        _write_first(target / PORTABLE, {**state, "groups": plain_options(optimizer.param_groups)})
    else:
        engine.save_checkpoint(os.fspath(directory), tag=tag)
    write_position(target, optimizer, None if portable else dist.get_world_size())
    return target


def _write_first(path: Path, state: dict[str, Any]) -> None:
    """Have the first process write ``path``, whole or not at all; all learn whether it could. Collective."""
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, partial)
            partial.rename(path)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError
            problem = [f"{in_one_line(error)}, {_space_for(path, state)}"]
            partial.unlink(missing_ok=True)
            with suppress(OSError):  # there is an older checkpoint of this name
                path.parent.rmdir()
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise OSError(problem[0])


def _space_for(path: Path, state: dict[str, Any]) -> str:
    """What a file needs and its disk has, for a message."""
    tensors = [*state["weights"].values(), *(part for member in state["active"].values() for part in member.values())]
    needed = sum(tensor.nbytes for tensor in tensors)
    parent = next(directory for directory in path.parents if directory.exists())
    return f"for {path}, which takes {format_bytes(needed)} where {format_bytes(disk_usage(parent).free)} are free"


def load_zero3_checkpoint(engine: Any, optimizer: BlockOptimizer, checkpoint: str | os.PathLike[str]) -> None:
    """Continue where :func:`save_zero3_checkpoint` wrote ``checkpoint``. Collective.

    Raises:
        InputError: if there is no complete checkpoint, or DeepSpeed wrote it for another number of processes.
        StateError: if it belongs to another model or partition; nothing is changed then.
    """
    path = Path(checkpoint)
    position = read_position(path)
    processes = position.pop("processes")
    if processes is None:
        _load_portable(path, engine, optimizer, position)
        return
    check_number(path, processes)
    optimizer.go_to(position)
    loaded, _ = engine.load_checkpoint(os.fspath(path.parent), tag=path.name)
    if loaded is None:
        raise StateError(f"DeepSpeed could not load the checkpoint at {path}.", advice="Use an older checkpoint.")


def load_portable_weights(checkpoint: str | os.PathLike[str], model: nn.Module) -> None:
    """Read the weights alone of a portable checkpoint into a partitioned model. Collective."""
    _scatter(model, _read(Path(checkpoint))["weights"])


def gathered_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights and buffers in the first process's host memory, nothing in the others. Collective."""
    import deepspeed

    kept: dict[str, Tensor] = {}
    names = set(model.state_dict(keep_vars=True))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            if dist.get_rank() == 0 and name in names:
                kept[name] = parameter.detach().cpu().clone()
    if dist.get_rank() == 0:
        kept |= {name: buffer.detach().cpu().clone() for name, buffer in model.named_buffers() if name in names}
    return kept


def _gathered_states(optimizer: BlockOptimizer) -> dict[str, dict[str, Tensor]]:
    driver = _driver(optimizer)
    found = {}
    for member in optimizer.active_parameters:
        whole = driver.gathered_state(member.parameter)
        if dist.get_rank() == 0:
            found[member.name] = {key: value.detach().cpu().clone() for key, value in whole.items()}
    return found


def _load_portable(path: Path, engine: Any, optimizer: BlockOptimizer, position: dict[str, Any]) -> None:
    saved = _read(path)
    optimizer.go_to(position)
    _scatter(engine.module, saved["weights"])
    driver = _driver(optimizer)
    for member in optimizer.active_parameters:
        driver.take_state(member.parameter, saved["active"][member.name])
    for group, options in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update(options)


def _scatter(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Write whole weights into partitioned parameters; every process keeps its part."""
    import deepspeed

    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if dist.get_rank() == 0:
                parameter.copy_(weights[name])


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path / PORTABLE, map_location="cpu", mmap=True, weights_only=True)
    return found


def _driver(optimizer: BlockOptimizer) -> ZeroThree:
    driver = optimizer.driven_by
    if driver is None:
        raise InputError(
            "DeepSpeed does not drive this optimizer yet.", advice="Set optimizer.ds_optimizer = engine.optimizer."
        )
    return driver

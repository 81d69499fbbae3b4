"""Checkpoints of ZeRO-3 runs: DeepSpeed's own, and beside them where in which visit they were taken.

DeepSpeed reads a checkpoint into the parameters that are trainable when it is called, so the block of the checkpoint
has to be active before. The saved partitions are those of a number of processes, and only so many can read them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from badam.block_optimizer import BlockOptimizer
from badam.errors import InputError, StateError

POSITION = "badam.json"


def save_zero3_checkpoint(
    engine: Any, optimizer: BlockOptimizer, directory: str | os.PathLike[str], tag: str | None = None
) -> Path:
    """Write a checkpoint with ``engine.save_checkpoint``, and the position last: with it the checkpoint is whole.

    Args:
        engine: what ``deepspeed.initialize`` returned first.
        optimizer: the block optimizer inside.
        directory: for all checkpoints of the run.
        tag: name of this one; by default it names the step.

    Returns:
        The checkpoint's own directory.
    """
    tag = tag or f"global_step{optimizer.global_step}"
    engine.save_checkpoint(os.fspath(directory), tag=tag)
    target = Path(directory) / tag
    dist.barrier()
    if dist.get_rank() == 0:
        position = {**optimizer.position(), "processes": dist.get_world_size()}
        partial = target / f".{POSITION}.partial"
        partial.write_text(json.dumps(position), encoding="utf-8")
        partial.rename(target / POSITION)
    dist.barrier()
    return target


def load_zero3_checkpoint(engine: Any, optimizer: BlockOptimizer, checkpoint: str | os.PathLike[str]) -> None:
    """Continue where :func:`save_zero3_checkpoint` wrote ``checkpoint``.

    Raises:
        InputError: if there is no whole checkpoint, or it was written by another number of processes.
        StateError: if it belongs to another model or partition; nothing is changed then.
    """
    path = Path(checkpoint)
    try:
        position = json.loads((path / POSITION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"There is no whole checkpoint at {path}: {POSITION} is missing or torn.", advice="Use an older checkpoint."
        ) from error
    processes = position.pop("processes")
    if processes != dist.get_world_size():
        raise InputError(
            f"The checkpoint at {path} was written by {processes} processes, and these are {dist.get_world_size()}.",
            advice=f"Start {processes} processes: ZeRO-3 reads its own partitions only. FSDP2's can be cut anew.",
        )
    optimizer.go_to(position)
    loaded, _ = engine.load_checkpoint(os.fspath(path.parent), tag=path.name)
    if loaded is None:
        raise StateError(f"DeepSpeed could not load the checkpoint at {path}.", advice="Use an older checkpoint.")

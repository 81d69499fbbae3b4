"""Where in which visit a ZeRO-3 checkpoint was taken: a file of ours beside DeepSpeed's, written last.

DeepSpeed reads a checkpoint into the parameters that are trainable when it is called, so the block of the checkpoint
has to be active before. With the position, the checkpoint is whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from badam.distributed.deepspeed.adapter import Driven
from badam.errors import InputError
from badam.files import write_file

POSITION = "badam.json"


def write_position(checkpoint: Path, optimizer: Driven, processes: int | None) -> None:
    """Note in ``checkpoint``, whose other files are there, where it was taken. Collective.

    Args:
        checkpoint: the checkpoint's own directory.
        optimizer: the block optimizer that DeepSpeed drives.
        processes: how many can read it; None for any number.
    """
    dist.barrier()
    if dist.get_rank() == 0:
        write_file(checkpoint / POSITION, json.dumps({**optimizer.position(), "processes": processes}))
    dist.barrier()


def read_position(checkpoint: Path) -> dict[str, Any]:
    """What :func:`write_position` noted: of ``BlockOptimizer.go_to``, and ``processes``.

    Raises:
        InputError: if there is nothing, so that the checkpoint is not complete.
    """
    try:
        position: dict[str, Any] = json.loads((checkpoint / POSITION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"There is no complete checkpoint at {checkpoint}: {POSITION} is missing or torn.",
            advice="Use an older checkpoint.",
        ) from error
    return position


def check_number(checkpoint: Path, processes: int | None) -> None:
    """Refuse a checkpoint that DeepSpeed wrote for another number of processes.

    Raises:
        InputError: with both numbers.
    """
    if processes is not None and processes != dist.get_world_size():
        raise InputError(
            f"The checkpoint at {checkpoint} was written by {processes} processes, and these are "
            f"{dist.get_world_size()}.",
            advice=f"Start {processes} processes, and save with portable=True for another number.",
        )

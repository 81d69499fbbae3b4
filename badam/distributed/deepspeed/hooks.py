"""Hosts that save and load through DeepSpeed's engine: Hugging Face's Trainer, accelerate, LLaMA-Factory.

DeepSpeed reads a checkpoint into the parameters that are trainable at that time, so the block of the checkpoint has to
be active before. A Trainer calls ``engine.load_checkpoint`` as soon as it has the engine, before any of its callbacks,
and nothing else is asked in between. So the engine's own two methods note the position and go there; for engines that
drive no block optimizer they are what they were.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from badam.distributed.deepspeed.adapter import Driven, check_installed
from badam.distributed.deepspeed.position import check_number, read_position, write_position
from badam.optim.base import innermost_optimizer


def follow_checkpoints() -> None:
    """Let ``engine.save_checkpoint`` and ``engine.load_checkpoint`` know of blocks; again and again is once.

    Raises:
        InputError: if DeepSpeed is missing or of a version that is not known. Loading raises one if the checkpoint has
            no position or was written by another number of processes.
        StateError: loading, if the checkpoint belongs to another model or partition; nothing is changed then.
    """
    check_installed()
    from deepspeed import DeepSpeedEngine

    if hasattr(DeepSpeedEngine.load_checkpoint, "__wrapped__"):
        return
    save, load = DeepSpeedEngine.save_checkpoint, DeepSpeedEngine.load_checkpoint

    @functools.wraps(save)
    def save_checkpoint(engine: Any, save_dir: Any, tag: Any = None, *args: Any, **options: Any) -> Any:
        saved = save(engine, save_dir, tag, *args, **options)
        optimizer = _block_optimizer(engine)
        if optimizer is not None and optimizer.ds_optimizer is not None:
            name = f"global_step{engine.global_steps}" if tag is None else str(tag)
            write_position(Path(save_dir) / name, optimizer, dist.get_world_size())
        return saved

    @functools.wraps(load)
    def load_checkpoint(engine: Any, load_dir: Any, tag: Any = None, *args: Any, **options: Any) -> Any:
        optimizer = _block_optimizer(engine)
        if optimizer is not None:
            optimizer.ds_optimizer = engine.optimizer
            _go_to_block_of(Path(load_dir) / (tag or _newest(load_dir)), optimizer)
        return load(engine, load_dir, tag, *args, **options)

    DeepSpeedEngine.save_checkpoint, DeepSpeedEngine.load_checkpoint = save_checkpoint, load_checkpoint


def _go_to_block_of(checkpoint: Path, optimizer: Driven) -> None:
    position = read_position(checkpoint)
    check_number(checkpoint, position.pop("processes"))
    if position != optimizer.position():
        optimizer.go_to(position)


def _newest(directory: str | os.PathLike[str]) -> str:
    """The checkpoint that DeepSpeed reads if none is named."""
    latest = Path(directory) / "latest"
    return latest.read_text(encoding="utf-8").strip() if latest.is_file() else ""


def _block_optimizer(engine: Any) -> Driven | None:
    found = innermost_optimizer(engine.optimizer)
    return found if isinstance(found, Driven) else None

"""Who drives a block optimizer: its caller, or DeepSpeed's ZeRO-3, to which this is the only door; it opens on use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from badam.distributed.deepspeed.adapter import Driven as Driven
    from badam.distributed.deepspeed.adapter import ZeroThree as ZeroThree


def connect_deepspeed(engine: Any, optimizer: Driven) -> ZeroThree:
    """Let DeepSpeed's optimizer ``engine``, which is around ``optimizer``, drive it from block to block.

    Raises:
        InputError: if ``engine`` is none of ZeRO stage 3, or DeepSpeed is missing or of a version that is not known.
    """
    from badam.distributed.deepspeed.adapter import ZeroThree

    adapter = ZeroThree(engine, optimizer)
    follow_checkpoints()
    return adapter


def follow_checkpoints() -> None:
    """Have DeepSpeed's checkpoints read into the block that was active when they were saved.

    Raises:
        InputError: if DeepSpeed is missing or of a version that is not known.
    """
    from badam.distributed.deepspeed import hooks

    hooks.follow_checkpoints()

"""Block-coordinate training over several processes: FSDP2, whole copies, checkpoints.

Names are loaded on first use. :func:`shard_blocks` and :func:`sharded_block_optimizer` are for FSDP2,
:func:`average_instead_of_ddp` for whole copies of a small model, :func:`save_checkpoint`, :func:`load_checkpoint` and
:func:`save_whole_model` for what is left on disk.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from badam.distributed.ddp import average_instead_of_ddp as average_instead_of_ddp
    from badam.distributed.deepspeed.saving import load_zero3_checkpoint as load_zero3_checkpoint
    from badam.distributed.deepspeed.saving import save_zero3_checkpoint as save_zero3_checkpoint
    from badam.distributed.fsdp2 import shard_blocks as shard_blocks
    from badam.distributed.fsdp2 import sharded_block_optimizer as sharded_block_optimizer
    from badam.distributed.saving import load_checkpoint as load_checkpoint
    from badam.distributed.saving import save_checkpoint as save_checkpoint
    from badam.distributed.saving import save_whole_model as save_whole_model

_HOMES = {
    "load_zero3_checkpoint": "badam.distributed.deepspeed.saving",
    "save_zero3_checkpoint": "badam.distributed.deepspeed.saving",
    "load_checkpoint": "badam.distributed.saving",
    "save_checkpoint": "badam.distributed.saving",
    "save_whole_model": "badam.distributed.saving",
    "average_instead_of_ddp": "badam.distributed.ddp",
    "shard_blocks": "badam.distributed.fsdp2",
    "sharded_block_optimizer": "badam.distributed.fsdp2",
}
__all__ = [
    "average_instead_of_ddp",
    "load_checkpoint",
    "load_zero3_checkpoint",
    "save_checkpoint",
    "save_whole_model",
    "save_zero3_checkpoint",
    "shard_blocks",
    "sharded_block_optimizer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

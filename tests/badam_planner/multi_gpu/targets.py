"""Several GPUs, or processes on the CPU."""

from __future__ import annotations

from badam.plan import Target
from badam_planner.multi_gpu.nccl import with_nccl

CPU = Target(gpu="cpu", total_bytes=2**40, usable_bytes=2**40)


def gpus_of(engine: str, cards: int, shard_size: int | None = None) -> Target:
    return CPU.model_copy(update={"engine": engine, "num_gpus": cards, "shard_size": shard_size})


def on_a100(cards: int, shard_size: int | None = None, engine: str = "fsdp2") -> Target:
    return with_nccl(gpus_of(engine, cards, shard_size).model_copy(update={"gpu": "a100-80gb"}))

"""What to try, in which order, and what wins. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from badam.plan import Checkpointing, Loss, Method, Strategy

PREFERENCE: tuple[Strategy, ...] = ("layer", "attn-mlp", "matrix")
"""Larger blocks first: they train more at a time; smaller ones only save memory."""


@dataclass(frozen=True, slots=True)
class Setting:
    """The two memory levers that cost time or exactness of nothing but time."""

    checkpointing: Checkpointing
    loss: Loss


def ladder(checkpointing: str, loss: str, can_chunk: bool) -> tuple[Setting, ...]:
    """The settings to try, fastest first. "auto" opens a lever; a model whose loss cannot be chunked keeps the full one.

    The chunked loss costs one more projection, checkpointing one more forward of every layer: hence the order.
    """
    levers: tuple[Checkpointing, ...] = ("none", "all") if checkpointing == "auto" else (_as(checkpointing),)
    losses: tuple[Loss, ...] = ("full", "chunked") if can_chunk else ("full",)
    if loss != "auto":
        losses = ("chunked" if loss == "chunked" else "full",)
    return tuple(Setting(lever, each) for lever in levers for each in losses)


def _as(checkpointing: str) -> Checkpointing:
    return "all" if checkpointing == "all" else "none"


def strategies(method: Method, partition: str) -> tuple[Strategy, ...]:
    """The partitions to try for a method, in order of preference."""
    if method == "adam":
        return ("full",)
    return PREFERENCE if partition == "auto" else tuple(known for known in PREFERENCE if known == partition)


def recommended_index(fits: list[bool]) -> int:
    """The first candidate that fits; candidates come in order of preference. The first if none does."""
    return fits.index(True) if True in fits else 0


def relief(batch_size: int, seq_len: int, shortest: int = 64) -> Iterator[tuple[str, dict[str, int]]]:
    """Changes that need less memory, the mildest first: same request, smaller batches, then shorter sequences.

    Yields:
        The options as the user would type them, and the changed fields of the request.
    """
    yield "", {}
    while batch_size > 1:
        batch_size //= 2
        yield f"--batch-size {batch_size}", {"batch_size": batch_size}
    while seq_len // 2 >= shortest:
        seq_len //= 2
        yield f"--batch-size 1 --seq-len {seq_len}", {"batch_size": 1, "seq_len": seq_len}

"""What to try, in which order, and what wins. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from badam.vocabulary import (
    Checkpointing,
    CheckpointingChoice,
    Loss,
    LossChoice,
    Method,
    PartitionChoice,
    SegmentsChoice,
    Strategy,
)

Found = TypeVar("Found")

PREFERENCE: tuple[Strategy, ...] = ("layer", "attn-mlp", "matrix")
"""Larger blocks first: they train more at a time; smaller ones only save memory."""


@dataclass(frozen=True, slots=True)
class MemorySetting:
    """The memory levers: what they save costs time and nothing else."""

    checkpointing: Checkpointing
    loss: Loss
    expandable_segments: bool = False


def ladder(
    checkpointing: CheckpointingChoice,
    loss: LossChoice,
    can_chunk: bool,
    *,
    expandable_segments: SegmentsChoice = "off",
) -> tuple[MemorySetting, ...]:
    """The settings to try, fastest first and leanest last. "auto" opens a lever, if the model's loss can be chunked.

    Expandable segments cost nothing that is seen in a step; the chunked loss costs one more projection, checkpointing
    one more forward of every layer: hence the order.
    """
    choices: tuple[Checkpointing, ...] = ("none", "all") if checkpointing == "auto" else (checkpointing,)
    losses: tuple[Loss, ...] = ("full", "chunked") if can_chunk else ("full",)
    if loss != "auto":
        losses = (loss,)
    allocators = (False, True) if expandable_segments == "auto" else (expandable_segments == "on",)
    return tuple(MemorySetting(choice, kind, grows) for choice in choices for kind in losses for grows in allocators)


def first_fitting(
    settings: Sequence[MemorySetting], attempt: Callable[[MemorySetting], Found | None]
) -> tuple[int, Found | None]:
    """The first of ``settings`` with which ``attempt`` finds that it fits.

    Args:
        settings: fastest first.
        attempt: what was found with a setting; None if it does not fit.

    Returns:
        The position of the setting and what was found; the number of settings and None if none fits.
    """
    for index, setting in enumerate(settings):
        found = attempt(setting)
        if found is not None:
            return index, found
    return len(settings), None


def strategies(method: Method, partition: PartitionChoice) -> tuple[Strategy, ...]:
    """The partitions to try for a method, in order of preference; one that trains no blocks has one of everything."""
    if method == "badam-ratio":
        return ("ratio",)
    if method == "lisa":  # samples whole layers
        return ("layer",)
    if method not in ("badam", "hift"):
        return ("full",)
    return PREFERENCE if partition == "auto" else (partition,)


def recommended_index(fits: list[bool]) -> int:
    """The first candidate that fits; candidates come in order of preference. The first if none does."""
    return fits.index(True) if True in fits else 0


@dataclass(frozen=True, slots=True)
class SmallerBatch:
    """A size of micro-batch to try, and the options that ask for it; none for the size of the request itself."""

    batch_size: int
    seq_len: int
    options: tuple[str, ...] = ()


def smaller_batch(batch_size: int, seq_len: int, shortest: int = 64) -> Iterator[SmallerBatch]:
    """Sizes that need less and less memory: that of the request, smaller batches, then single shorter sequences."""
    yield SmallerBatch(batch_size, seq_len)
    while batch_size > 1:
        batch_size //= 2
        yield SmallerBatch(batch_size, seq_len, (f"--batch-size {batch_size}",))
    while seq_len // 2 >= shortest:
        seq_len //= 2
        yield SmallerBatch(1, seq_len, ("--batch-size 1", f"--seq-len {seq_len}"))

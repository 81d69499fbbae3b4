"""From the steps of a run to its measurement: peaks are maxima, seconds are medians. Imports no torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from badam.errors import BadamError
from badam.profiling.memory.source import StepMemory
from badam.profiling.record import BlockMeasurement, Measurement
from badam.vocabulary import STEP_PHASES, Phase

LOSS_WINDOW = 10
"""First and last loss are means over this many optimizer steps: single batches differ too much to show learning."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step: the block that was active, its memory if that was measured, and its seconds by phase."""

    block: int
    memory: StepMemory | None
    seconds: dict[Phase, float]


@dataclass(slots=True)
class RunLog:
    """The steps of a run with the losses and tokens that the loop told."""

    steps: list[StepRecord] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tokens_after_first: int = 0
    first_note: float | None = None  # when, in seconds of time.perf_counter
    last_note: float = 0.0

    def add(self, step: StepRecord) -> None:
        """Append one step."""
        self.steps.append(step)

    def note(self, loss: float | None, tokens: int) -> None:
        """Append one loss and count tokens; the rate is counted from the first call on, which follows warming up."""
        self.last_note = time.perf_counter()
        if self.first_note is None:
            self.first_note = self.last_note
        else:
            self.tokens_after_first += tokens
        if loss is not None:
            self.losses.append(loss)

    def leave_out(self, seconds: float) -> None:
        """Seconds since the last note that were no training."""
        if self.first_note is not None:
            self.first_note += seconds

    def tokens_per_second(self) -> float:
        """Tokens per second of wall time, but for what was left out; 0.0 where there were fewer than two notes."""
        elapsed = self.last_note - (self.first_note or self.last_note)
        return self.tokens_after_first / elapsed if elapsed > 0 else 0.0


def summarize(log: RunLog, block_names: Sequence[str], memory_source: str) -> Measurement:
    """The measurement of a run.

    Args:
        log: its steps.
        block_names: names of the plan's blocks, by index.
        memory_source: how bytes were measured.

    Raises:
        BadamError: if there is no step or no loss.
    """
    measured = [(step.block, step.memory) for step in log.steps if step.memory is not None]
    if not measured or not log.losses:
        raise BadamError(
            f"Nothing to record: {len(log.steps)} optimizer steps and {len(log.losses)} losses were seen.",
            advice="Train at least one step, and tell its loss with run.note(loss=...).",
        )
    worst_block, worst = max(measured, key=lambda one: one[1].peak_bytes)
    window = max(1, min(LOSS_WINDOW, len(log.losses) // 2))
    memories = [memory for _, memory in measured]
    return Measurement(
        memory_source=f"{memory_source}, {len(measured)} of {len(log.steps)} steps",
        peak_allocated_bytes=worst.peak_bytes,
        peak_reserved_bytes=_highest(memory.reserved_bytes for memory in memories),
        peak_device_bytes=_highest(memory.device_bytes for memory in memories),
        by_category=worst.by_category,
        by_phase=_peaks(memories),
        peak_phase=worst.peak_phase,
        peak_block=block_names[worst_block],
        seconds_by_phase=_median_seconds(log.steps),
        step_seconds=statistics.median(
            sum(step.seconds.get(phase, 0.0) for phase in STEP_PHASES) for step in log.steps
        ),
        blocks=tuple(
            _block(
                block_names[index],
                [memory for block, memory in measured if block == index],
                [step for step in log.steps if step.block == index],
            )
            for index in sorted({block for block, _ in measured})
        ),
        steps=len(log.steps),
        first_loss=statistics.fmean(log.losses[:window]),
        last_loss=statistics.fmean(log.losses[-window:]),
        tokens_per_second=log.tokens_per_second(),
    )


def _block(name: str, memories: Sequence[StepMemory], steps: Sequence[StepRecord]) -> BlockMeasurement:
    worst = max(memories, key=lambda memory: memory.peak_bytes)
    return BlockMeasurement(
        name=name,
        steps=len(memories),
        peak_allocated_bytes=worst.peak_bytes,
        peak_phase=worst.peak_phase,
        peak_by_phase=_peaks(memories),
        seconds_by_phase=_median_seconds(steps),
    )


def _peaks(memories: Iterable[StepMemory]) -> dict[Phase, int]:
    peaks: dict[Phase, int] = {}
    for memory in memories:
        for phase, size in memory.peak_by_phase.items():
            peaks[phase] = max(peaks.get(phase, 0), size)
    return {phase: peaks[phase] for phase in Phase if phase in peaks}


def _median_seconds(steps: Iterable[StepRecord]) -> dict[Phase, float]:
    """Per phase, over the steps that had it: a switch happens in few."""
    seconds: dict[Phase, list[float]] = {}
    for step in steps:
        for phase, duration in step.seconds.items():
            seconds.setdefault(phase, []).append(duration)
    return {phase: statistics.median(seconds[phase]) for phase in Phase if phase in seconds}


def _highest(sizes: Iterable[int | None]) -> int | None:
    return max((size for size in sizes if size is not None), default=None)

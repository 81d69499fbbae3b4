"""From the steps of a run to its measurement: peaks are maxima, seconds are medians. Imports no torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from badam.errors import BadamError
from badam.profiling.memory import StepMemory
from badam.profiling.record import BlockMeasurement, Measurement
from badam.vocabulary import STEP_PHASES, Phase

LOSS_WINDOW = 10
"""First and last loss are means over this many optimizer steps: single batches differ too much to show learning."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step: the block that was active, its memory, and its seconds by phase."""

    block: int
    memory: StepMemory
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

    def tokens_per_second(self) -> float:
        """Tokens per second of wall time, everything included; 0.0 where there were fewer than two notes."""
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
    if not log.steps or not log.losses:
        raise BadamError(
            f"Nothing to record: {len(log.steps)} optimizer steps and {len(log.losses)} losses were seen.",
            advice="Train at least one step, and tell its loss with run.note(loss=...).",
        )
    worst = max(log.steps, key=lambda step: step.memory.peak_bytes)
    window = max(1, min(LOSS_WINDOW, len(log.losses) // 2))
    visited = sorted({step.block for step in log.steps})
    return Measurement(
        memory_source=memory_source,
        peak_allocated_bytes=worst.memory.peak_bytes,
        peak_reserved_bytes=_highest(step.memory.reserved_bytes for step in log.steps),
        peak_device_bytes=_highest(step.memory.device_bytes for step in log.steps),
        by_category=worst.memory.by_category,
        by_phase=_peaks(log.steps),
        peak_phase=worst.memory.peak_phase,
        peak_block=block_names[worst.block],
        seconds_by_phase=_median_seconds(log.steps),
        step_seconds=statistics.median(
            sum(step.seconds.get(phase, 0.0) for phase in STEP_PHASES) for step in log.steps
        ),
        blocks=tuple(_block(block_names[index], [s for s in log.steps if s.block == index]) for index in visited),
        steps=len(log.steps),
        first_loss=statistics.fmean(log.losses[:window]),
        last_loss=statistics.fmean(log.losses[-window:]),
        tokens_per_second=log.tokens_per_second(),
    )


def _block(name: str, steps: Sequence[StepRecord]) -> BlockMeasurement:
    worst = max((step.memory for step in steps), key=lambda memory: memory.peak_bytes)
    return BlockMeasurement(
        name=name,
        steps=len(steps),
        peak_allocated_bytes=worst.peak_bytes,
        peak_phase=worst.peak_phase,
        peak_by_phase=_peaks(steps),
        seconds_by_phase=_median_seconds(steps),
    )


def _peaks(steps: Iterable[StepRecord]) -> dict[Phase, int]:
    peaks: dict[Phase, int] = {}
    for step in steps:
        for phase, size in step.memory.peak_by_phase.items():
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

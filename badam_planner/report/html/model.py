"""What the HTML report draws that is neither a plan nor a comparison: a step's timeline and a training curve. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from badam.vocabulary import Category, Phase
from badam_planner.recording.timeline import Timeline

MOST_SAMPLES = 400
"""Enough for every pixel column of a chart to matter, few enough to keep the file small."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Live bytes just after one event, and what the event was."""

    tick: int
    phase: Phase
    by_category: dict[Category, int]
    module: str
    tensor: str  # what was born or died, in words
    change_bytes: int  # positive for a birth

    @property
    def total_bytes(self) -> int:
        return sum(self.by_category.values())


@dataclass(frozen=True, slots=True)
class PhaseSpan:
    """A phase from its first tick to its last, with the highest live bytes between.

    Recomputation interrupts backward once per checkpointed layer; here it is part of backward, as on a clock.
    """

    phase: Phase
    begin: int
    end: int
    peak_bytes: int
    module: str  # that ran at the peak


@dataclass(frozen=True, slots=True)
class StepTimeline:
    """The memory of one training step, event by event, thinned so that no peak is lost."""

    title: str
    samples: tuple[Sample, ...]
    spans: tuple[PhaseSpan, ...]
    limit_bytes: int


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One logged optimizer step."""

    step: int
    loss: float
    block: str | None = None  # active then


@dataclass(frozen=True, slots=True)
class TrainingCurve:
    """The loss of a run over its steps."""

    name: str
    points: tuple[CurvePoint, ...]


def sample_timeline(
    timeline: Timeline, *, title: str, limit_bytes: int, start: int = 0, most: int = MOST_SAMPLES
) -> StepTimeline:
    """Thin a timeline for drawing, from tick ``start`` on.

    Of every run of neighbouring events the one with the most live bytes is kept, and the first event of every phase,
    so the drawn peak of the step and of each phase is the true one. What the allocator adds (workspace, context,
    cache) is not part of a timeline.
    """
    samples = [sample for sample in _samples(timeline) if sample.tick >= start]
    spans = _spans(samples)
    stride = max(1, -(-len(samples) // most))
    kept = {max(samples[first : first + stride], key=_height).tick for first in range(0, len(samples), stride)}
    for span in spans:
        inside = [sample for sample in samples if span.begin <= sample.tick <= span.end]
        kept |= {span.begin, span.end, max(inside, key=_height).tick}
    return StepTimeline(title, tuple(sample for sample in samples if sample.tick in kept), spans, limit_bytes)


def _height(sample: Sample) -> int:
    return sample.total_bytes


def _samples(timeline: Timeline) -> list[Sample]:
    live: dict[Category, int] = {}
    samples = []
    for tick, change, index in timeline.events():
        allocation, category = timeline.recording.allocations[index], timeline.categories[index]
        live[category] = live.get(category, 0) + change
        samples.append(
            Sample(tick, timeline.phase_at(tick), dict(live), allocation.module, allocation.describe(), change)
        )
    return samples


def _spans(samples: Sequence[Sample]) -> tuple[PhaseSpan, ...]:
    runs: list[list[Sample]] = []
    for sample in samples:
        if runs and _shown_phase(runs[-1][0]) is _shown_phase(sample):
            runs[-1].append(sample)
        else:
            runs.append([sample])
    spans = []
    for run in runs:
        peak = max(run, key=_height)
        spans.append(PhaseSpan(_shown_phase(run[0]), run[0].tick, run[-1].tick, peak.total_bytes, peak.module))
    return tuple(spans)


def _shown_phase(sample: Sample) -> Phase:
    return Phase.BACKWARD if sample.phase is Phase.RECOMPUTE else sample.phase

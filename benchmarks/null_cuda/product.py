"""The parts of the product that the null device's tools look into, named in one place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from badam.plan import Plan
from badam.vocabulary import Phase
from badam_planner.recording.caching_allocator import ROUNDING, CachingAllocator, SimulatedAllocator
from badam_planner.recording.expandable_allocator import ExpandableAllocator
from badam_planner.recording.replay import replay
from badam_planner.recording.timeline import Timeline
from badam_planner.rehearsal.evaluator import Evaluator
from badam_planner.rehearsal.model_tree import ModelTree

__all__ = ["Predicted", "PredictedEvent", "SimulatedAllocator", "predicted_requests", "round_up", "simulated_allocator"]


def round_up(nbytes: int) -> int:
    """``nbytes`` rounded as the allocator rounds what is asked for."""
    return max(-(-nbytes // ROUNDING), 1) * ROUNDING


def simulated_allocator(*, expandable_segments: bool = False) -> SimulatedAllocator[Any, Any]:
    """A simulated allocator with nothing in it."""
    return ExpandableAllocator() if expandable_segments else CachingAllocator()


@dataclass(frozen=True, slots=True)
class PredictedEvent:
    """One birth (``nbytes`` above 0) or death (below 0) in a rehearsal; what was there before has phase SETUP."""

    nbytes: int
    phase: Phase  # of a death: in which the last birth before it was
    what: str


@dataclass(frozen=True, slots=True)
class Predicted:
    """What the product says happens while one block is active."""

    events: tuple[PredictedEvent, ...]
    at_peak: tuple[tuple[int, int, str], ...]  # alive: bytes as asked for, rounded; of its block; what it is
    peak_allocated: int
    peak_reserved: int


def predicted_requests(plan: Plan, tree: ModelTree, block: int) -> Predicted:
    """The events that the product predicts for a block of a plan on a GPU, in order."""
    recording = Evaluator(tree).recording(plan, block)
    timeline = Timeline(recording, tree.head_module, granularity=ROUNDING, on_gpu=True)
    replayed = replay(timeline, expandable_segments=plan.target.expandable_segments)
    in_blocks = timeline.resized(replayed.sizes)
    peak = max(replayed.by_phase.values(), key=lambda each: each.nbytes)
    alive = tuple(
        (round_up(allocation.nbytes), nbytes, f"{allocation.describe()} [{category}]")
        for allocation, category, nbytes in in_blocks.live_at(peak.tick)
        if nbytes
    )
    return Predicted(tuple(_events(timeline)), alive, peak.nbytes, replayed.allocator.peak_reserved)


def _events(timeline: Timeline) -> Iterator[PredictedEvent]:
    phase = Phase.SETUP
    for tick, change, index in timeline.events():
        allocation = timeline.recording.allocations[index]
        if change > 0:
            phase = timeline.phase_at(tick) if tick >= 0 else Phase.SETUP
        if change:
            yield PredictedEvent(change, phase, allocation.describe())

"""A recording through the simulated allocator, visit after visit, until nothing changes any more. Pure, no torch.

A GPU's allocator keeps what it has reserved, so what it reserves depends on what came before. The first step of a visit
runs before its master copies and moments exist; the first update then puts these where that step's tensors were, the
second step finds other places for its own, and the next visit begins with the segments that this one has left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from badam.vocabulary import Category, Phase
from badam_planner.recording.caching_allocator import CachingAllocator, SimulatedAllocator
from badam_planner.recording.expandable_allocator import ExpandableAllocator
from badam_planner.recording.timeline import Peak, Piece, Timeline

MOST_VISITS = 8
"""More visits are not replayed, should the allocator's segments still not repeat themselves."""


@dataclass(frozen=True, slots=True)
class Replay:
    """What became of a recording's requests. Bytes."""

    allocator: SimulatedAllocator[Any, Any]  # after the last event
    by_phase: dict[Phase, Peak]  # the highest bytes of the blocks that are taken
    sizes: list[int]  # of the block that each allocation got, in the visit with the highest peak
    visits: int


def replay(timeline: Timeline, capacity: int | None = None, *, expandable_segments: bool = False) -> Replay:
    """Run a timeline through the simulated allocator, or through the one with expandable segments.

    A recording of two steps and more is repeated from its first step on if it ends a visit, else its last step is,
    until the allocator's free blocks are those after an earlier visit.

    Raises:
        AllocationRefused: if ``capacity`` bytes of segments are not enough.
    """
    allocator: SimulatedAllocator[Any, Any]
    allocator = ExpandableAllocator(capacity) if expandable_segments else CachingAllocator(capacity)
    run = _Run(timeline, allocator)
    run.through(timeline.pieces)
    visits = 1
    repeated = repeated_pieces(timeline)
    if repeated:
        seen = {allocator.layout()}
        while visits < MOST_VISITS:
            run.through(repeated)
            visits += 1
            layout = allocator.layout()
            if layout in seen:
                break
            seen.add(layout)
    return Replay(allocator, run.by_phase, run.sizes_at_peak, visits)


def repeated_pieces(timeline: Timeline) -> list[Piece]:
    """What training repeats of a recording: a whole visit, or the last step where no visit ends; maybe nothing."""
    steps = timeline.recording.steps
    if len(steps) < 2:
        return []
    begin = steps[0][0] if timeline.recording.switches else steps[-1][0]
    return [piece for piece in timeline.pieces if piece.begin >= begin]


class _Run:
    """A timeline on its way through an allocator."""

    def __init__(self, timeline: Timeline, allocator: SimulatedAllocator[Any, Any]) -> None:
        self.timeline = timeline
        self.allocator = allocator
        self.by_phase: dict[Phase, Peak] = {}
        self.sizes_at_peak: list[int] = []
        self._sizes = [0] * len(timeline.sizes)
        self._highest = -1
        self._alive: set[int] = set()
        self._kept = {
            index
            for index, one in enumerate(timeline.recording.allocations)
            if one.category is Category.WORKSPACE and one.gpu_only
        }

    def through(self, pieces: Sequence[Piece]) -> None:
        """Let the events of ``pieces`` happen once more."""
        sizes = self._sizes = list(self._sizes)
        asked, allocations = self.timeline.sizes, self.timeline.recording.allocations
        allocator, alive = self.allocator, self._alive
        allocate, release = allocator.allocate, allocator.release
        live = allocator.allocated
        for begin, phase, changes in pieces:
            top, tick, where = live, begin, ""
            for when, change in changes:
                if change < 0:
                    if ~change in alive:
                        alive.remove(~change)
                        release(~change)
                        live -= sizes[~change]
                    continue
                if change in alive:
                    if change in self._kept:  # taken for good in the first visit
                        continue
                    release(change)
                    live -= sizes[change]
                alive.add(change)
                sizes[change] = size = allocate(change, asked[change])
                live += size
                if live > top:
                    top, tick, where = live, when, allocations[change].module
            if phase not in self.by_phase or top > self.by_phase[phase].nbytes:
                self.by_phase[phase] = Peak(top, tick, phase, where)
                if top > self._highest:
                    self._highest, self.sizes_at_peak = top, sizes

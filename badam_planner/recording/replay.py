"""Recordings through the simulated allocator, visit after visit, until nothing changes any more. Pure, no torch.

A GPU's allocator keeps what it has reserved, so what it reserves depends on what came before. The first step of a visit
runs before its master copies and moments exist; the first update then puts these where that step's tensors were, the
second step finds other places for its own, and the next visit, maybe to a block of another shape, begins with the
segments that this one has left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from badam.vocabulary import Category, Phase
from badam_planner.recording.caching_allocator import CachingAllocator, SimulatedAllocator
from badam_planner.recording.expandable_allocator import ExpandableAllocator
from badam_planner.recording.timeline import Peak, Piece, Timeline

MOST_ROUNDS = 8
"""More rounds of visits are not replayed, should the allocator's segments still not repeat themselves."""


@dataclass(frozen=True, slots=True)
class Visited:
    """What became of the requests of one recording. Bytes."""

    by_phase: dict[Phase, Peak]  # the highest bytes of blocks that are taken, everything else's included
    sizes: list[int]  # of the block that each allocation got, in the round with the highest peak


@dataclass(frozen=True, slots=True)
class Replay:
    """What became of the requests of several recordings. Bytes."""

    allocator: SimulatedAllocator[Any, Any]  # after the last event
    visited: tuple[Visited, ...]  # by recording
    rounds: int
    releases_per_step: float  # of the last round: how often all free segments went back because there was no room

    @property
    def by_phase(self) -> dict[Phase, Peak]:
        """Those of the first recording."""
        return self.visited[0].by_phase

    @property
    def sizes(self) -> list[int]:
        """Those of the first recording."""
        return self.visited[0].sizes


def replay(*timelines: Timeline, capacity: int | None = None, expandable_segments: bool = False) -> Replay:
    """Run visits to blocks of one model, each a timeline, through the simulated allocator, in turns.

    What is there before the first step of the first one, weights above all, is there for all of them. A recording of
    two steps and more is repeated from its first step on if it ends a visit, else its last step is, until the
    allocator's free blocks are those after an earlier round.

    Args:
        timelines: of the visits, in order.
        capacity: bytes of segments that the GPU has room for; None for any number.
        expandable_segments: which kind of segments.

    Raises:
        AllocationRefused: if ``capacity`` bytes of segments are not enough, even with every free one given back.
    """
    allocator: SimulatedAllocator[Any, Any]
    allocator = ExpandableAllocator(capacity) if expandable_segments else CachingAllocator(capacity)
    visits: list[_Visit] = []
    for number, timeline in enumerate(timelines):
        visits.append(_Visit(timeline, allocator, number, shares_start=number > 0))
        visits[-1].through(timeline.pieces if number == 0 else visits[-1].pieces)
    repeated = [(visit, repeated_pieces(visit.timeline)) for visit in visits]
    rounds, releases = 1, allocator.releases
    if all(pieces for _, pieces in repeated):
        seen = {allocator.layout()}
        while rounds < MOST_ROUNDS:
            before = allocator.releases
            for visit, pieces in repeated:
                visit.through(pieces)
            rounds, releases = rounds + 1, allocator.releases - before
            layout = allocator.layout()
            if layout in seen:
                break
            seen.add(layout)
    steps = sum(_steps_in(visit.timeline, once=rounds == 1) for visit in visits)
    return Replay(allocator, tuple(Visited(v.by_phase, v.sizes_at_peak) for v in visits), rounds, releases / steps)


def repeated_pieces(timeline: Timeline) -> list[Piece]:
    """What training repeats of a recording: a whole visit, or the last step where no visit ends; maybe nothing."""
    steps = timeline.recording.steps
    if len(steps) < 2:
        return []
    begin = steps[0][0] if timeline.recording.switches else steps[-1][0]
    return [piece for piece in timeline.pieces if piece.begin >= begin]


def _steps_in(timeline: Timeline, *, once: bool) -> int:
    """Optimizer steps of a round."""
    steps = max(len(timeline.recording.steps), 1)
    return steps if once or timeline.recording.switches else 1


class _Visit:
    """One of the visits in turns."""

    def __init__(
        self, timeline: Timeline, allocator: SimulatedAllocator[Any, Any], number: int, *, shares_start: bool
    ) -> None:
        self.timeline = timeline
        self.allocator = allocator
        self.by_phase: dict[Phase, Peak] = {}
        self.sizes_at_peak: list[int] = []
        self._first_handle = number * MOST_ALLOCATIONS
        self._sizes = [0] * len(timeline.sizes)
        self._highest = -1
        self._alive: set[int] = set()
        begin = timeline.recording.steps[0][0] if timeline.recording.steps else 0
        self.pieces = [piece for piece in timeline.pieces if piece.begin >= begin]
        self._kept = {
            index
            for index, one in enumerate(timeline.recording.allocations)
            if one.category is Category.WORKSPACE and one.gpu_only
        }
        if shares_start:
            self._alive |= self._kept  # the first visit has taken them

    def through(self, pieces: Sequence[Piece]) -> None:
        """Let the events of ``pieces`` happen once more."""
        sizes = self._sizes = list(self._sizes)
        asked, allocations = self.timeline.sizes, self.timeline.recording.allocations
        allocator, alive, first = self.allocator, self._alive, self._first_handle
        allocate, release = allocator.allocate, allocator.release
        live = allocator.allocated
        for begin, phase, changes in pieces:
            top, tick, where = live, begin, ""
            for when, change in changes:
                if change < 0:
                    if ~change in alive:
                        alive.remove(~change)
                        release(first + ~change)
                        live -= sizes[~change]
                    continue
                if change in alive:
                    if change in self._kept:  # taken for good in the first visit
                        continue
                    release(first + change)
                    live -= sizes[change]
                alive.add(change)
                sizes[change] = size = allocate(first + change, asked[change])
                live += size
                if live > top:
                    top, tick, where = live, when, allocations[change].module
            if phase not in self.by_phase or top > self.by_phase[phase].nbytes:
                self.by_phase[phase] = Peak(top, tick, phase, where)
                if top > self._highest:
                    self._highest, self.sizes_at_peak = top, sizes


MOST_ALLOCATIONS = 1 << 40
"""Of one recording, at most: handles of the next one's begin there."""

"""From events to answers: live bytes over a step, its peak, and what is alive there. Pure, no torch."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import NamedTuple

from badam.vocabulary import Category, Phase
from badam_planner.recording.recording import NEVER, Allocation, Recording

LOSS_MODULE = "loss"
"""Where backward is before it reaches the first module: the loss function."""


@dataclass(frozen=True, slots=True)
class Peak:
    """The moment of highest live bytes within a span."""

    nbytes: int
    tick: int
    phase: Phase
    module: str


class Piece(NamedTuple):
    """A stretch of one phase, with the changes in it: the tick of each, as :attr:`Timeline.changes` has them."""

    begin: int
    phase: Phase
    changes: list[tuple[int, int]]


class Timeline:
    """Live bytes as a function of the tick, from a recording.

    The classification of allocations that nobody labelled follows from birth and death alone: what forward or
    recomputation makes and backward still finds is an activation, everything else is temporary; but whatever the
    output projection and the loss make is logits and loss, in both directions.
    """

    def __init__(
        self, recording: Recording, head_module: str = "", *, granularity: int = 1, on_gpu: bool = False
    ) -> None:
        """Read a recording.

        Args:
            recording: what happened.
            head_module: path of the output projection.
            granularity: sizes are rounded up to multiples of so many bytes, as an allocator does.
            on_gpu: count the scratch of the GPU's kernels too.
        """
        self.recording = recording
        self.granularity = granularity
        self.on_gpu = on_gpu
        self.sizes = [
            0 if allocation.gpu_only and not on_gpu else -(-allocation.nbytes // granularity) * granularity
            for allocation in recording.allocations
        ]
        self._starts = [tick for tick, _ in recording.phase_starts]
        self._phases = [phase for _, phase in recording.phase_starts]
        self._backward_starts = [tick for tick, phase in recording.phase_starts if phase is Phase.BACKWARD]
        self.categories = [self._classify(allocation, head_module) for allocation in recording.allocations]

    def resized(self, sizes: Sequence[int]) -> Timeline:
        """The same timeline with other sizes, such as those of the blocks that an allocator gave: one by allocation."""
        _ = self.pieces  # found once for all of them
        other = copy(self)
        other.sizes = list(sizes)
        return other

    def phase_at(self, tick: int) -> Phase:
        """The phase in which ``tick`` happened."""
        return self._phases[bisect_right(self._starts, tick) - 1]

    def _classify(self, allocation: Allocation, head_module: str) -> Category:
        if allocation.category is not None:
            return allocation.category
        inside_loss = allocation.module == LOSS_MODULE or (head_module and allocation.module == head_module)
        if allocation.phase is Phase.LOSS or (inside_loss and allocation.phase in (Phase.BACKWARD, Phase.RECOMPUTE)):
            return Category.LOGITS
        if allocation.phase in (Phase.FORWARD, Phase.RECOMPUTE):
            following = bisect_right(self._backward_starts, allocation.born)
            begins = self._backward_starts[following] if following < len(self._backward_starts) else NEVER
            survives = allocation.died == NEVER or (begins != NEVER and allocation.died > begins)
            return Category.ACTIVATION if survives else Category.TEMPORARY
        return Category.TEMPORARY

    def events(self) -> Iterator[tuple[int, int, int]]:
        """(tick, change in bytes, index of the allocation) in order of time."""
        sizes = self.sizes
        return (
            (tick, -sizes[~change] if change < 0 else sizes[change], ~change if change < 0 else change)
            for tick, change in self.changes
        )

    @cached_property
    def changes(self) -> list[tuple[int, int]]:
        """(tick, index of the allocation that is born then, or ``~index`` of the one that dies), in order of time.

        What dies in a tick is gone before anything is born in it.
        """
        allocations = self.recording.allocations
        changes = [(one.died, ~index) for index, one in enumerate(allocations) if one.died != NEVER]
        changes += [(one.born, index) for index, one in enumerate(allocations)]
        changes.sort(key=itemgetter(0))
        return changes

    def peak(self) -> Peak:
        """The highest live bytes."""
        return max(self.peak_by_phase().values(), key=lambda peak: peak.nbytes)

    def peak_by_phase(self) -> dict[Phase, Peak]:
        """The highest live bytes within each phase.

        A phase begins with what is alive when it begins, so its peak is at least that.
        """
        best: dict[Phase, Peak] = {}
        sizes, live = self.sizes, 0
        for begin, phase, changes in self.pieces:
            top, tick, where = live, begin, ""
            for when, change in changes:
                if change < 0:
                    live -= sizes[~change]
                else:
                    live += sizes[change]
                    if live > top:
                        top, tick, where = live, when, self.recording.allocations[change].module
            if phase not in best or top > best[phase].nbytes:
                best[phase] = Peak(top, tick, phase, where)
        return best

    @cached_property
    def pieces(self) -> list[Piece]:
        """The phases in order, each with the tick when it began and the changes from then on."""
        starts = [bisect_left(self.changes, (begin,)) for begin in self._starts]
        starts[0] = 0
        spans = zip(starts, [*starts[1:], len(self.changes)], strict=True)
        return [
            Piece(begin, phase, self.changes[first:end])
            for begin, phase, (first, end) in zip(self._starts, self._phases, spans, strict=True)
        ]

    def live_at(self, tick: int) -> list[tuple[Allocation, Category, int]]:
        """What is alive just after ``tick``, with its category and bytes, largest first."""
        alive = [
            (allocation, category, size)
            for allocation, category, size in zip(self.recording.allocations, self.categories, self.sizes, strict=True)
            if allocation.born <= tick and (allocation.died == NEVER or allocation.died > tick)
        ]
        return sorted(alive, key=lambda item: -item[2])

    def by_category(self, tick: int) -> dict[Category, int]:
        """Live bytes just after ``tick``, by category; sums to the live bytes there."""
        totals: dict[Category, int] = {}
        for _, category, size in self.live_at(tick):
            totals[category] = totals.get(category, 0) + size
        return totals

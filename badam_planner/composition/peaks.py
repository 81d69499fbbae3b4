"""The peaks of a composed recording without composing it. Pure, no torch.

Where badam_planner.composition.compose writes every repeated cycle out, here a repeated stretch is passed once: of
``n`` equal passages, each of which adds ``d`` bytes and rises at most ``m`` above its begin, the highest point is
``max(0, (n - 1) d) + m`` above the first one's begin. So the peak of a model with 126 layers takes as long as that of
one with four, and the blocks of one rehearsal differ in ``n`` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from badam.plan import Target
from badam.vocabulary import Phase
from badam_planner.composition.compose import growth
from badam_planner.composition.layer_cycles import Item, LayerCycles, NotPeriodic, times_of_cycle
from badam_planner.recording.caching_allocator import ROUNDING
from badam_planner.recording.recording import Recording, bytes_of

FEWEST_CYCLES = 3
"""With two cycles the last releases what the first made, whose sizes nothing has compared with the middle ones'."""


@dataclass(frozen=True, slots=True)
class BlockPeaks:
    """The highest allocated bytes while one block is active."""

    peak_allocated_bytes: int
    peak_phase: Phase
    by_phase: dict[Phase, int]


class _Step(NamedTuple):
    """A birth (sign 1) or a death (sign -1) of an allocation, or the start of a phase (sign 0)."""

    allocation: int
    sign: int
    phase: Phase | None = None


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Steps that follow each other and belong to the same passage of a run's cycle; ``run`` is None outside of runs."""

    run: int | None
    cycle: int
    steps: tuple[_Step, ...]

    def times(self, totals: Sequence[int]) -> int:
        """How often it happens in a model whose runs have so many cycles."""
        return 1 if self.run is None else times_of_cycle(self.cycle, totals[self.run])


class DepthPeaks:
    """A recording with four cycles of each run, ready to be asked for the peaks with any number of them."""

    def __init__(self, recording: Recording, runs: Sequence[Sequence[tuple[str, ...]]], target: Target) -> None:
        """Read a recording.

        Args:
            recording: of a rehearsal.
            runs: for each run of equal cycles the layers (module paths) of its four cycles.
            target: sizes are counted as on this device: rounded on a GPU, which also takes scratch.

        Raises:
            NotPeriodic: if a run cannot be composed.
        """
        self._recording = recording
        self._on_gpu = target.gpu != "cpu"
        self._granularity = ROUNDING if self._on_gpu else 1
        self._first_phase = recording.phase_starts[0][1]
        self._stretches = _stretches(recording, runs)
        self._growing = [(index, one.shares) for index, one in enumerate(recording.allocations) if one.shares]
        self._place_of_layer = {
            layer: (number, place)
            for number, cycles in enumerate(runs)
            for place, cycle in enumerate(cycles)
            for layer in cycle
        }

    def peaks(self, totals: Sequence[int], numbers: Sequence[int] | None = None) -> BlockPeaks:
        """The peaks with ``totals[i]`` cycles of run ``i``.

        Args:
            totals: cycles, by run.
            numbers: of a size, if the recording is the pattern of a family; its bytes otherwise.

        Raises:
            NotPeriodic: if a run has fewer than three cycles.
        """
        if any(total < FEWEST_CYCLES for total in totals):
            raise NotPeriodic(f"of {min(totals)} cycles an outline says nothing")
        sizes = self._sizes(totals, numbers)
        live, phase = 0, self._first_phase
        highest = {phase: 0}
        for stretch in self._stretches:
            times = stretch.times(totals)
            if times:
                live, phase = _passed(stretch.steps, sizes, times, live, phase, highest)
        at = max(highest, key=lambda each: highest[each])
        return BlockPeaks(highest[at], at, highest)

    def _sizes(self, totals: Sequence[int], numbers: Sequence[int] | None) -> list[int]:
        """Rounded bytes by allocation."""
        granularity = self._granularity

        def times(place: tuple[int, int]) -> int:
            return times_of_cycle(place[1], totals[place[0]])

        exact = [
            (one.nbytes if numbers is None else bytes_of(one, numbers[one.size_law]))
            if self._on_gpu or not one.gpu_only
            else 0
            for one in self._recording.allocations
        ]
        for index, shares in self._growing:
            exact[index] += growth(shares, self._place_of_layer, times)
        return [-(-nbytes // granularity) * granularity for nbytes in exact]


def _passed(
    steps: tuple[_Step, ...], sizes: Sequence[int], times: int, live: int, phase: Phase, highest: dict[Phase, int]
) -> tuple[int, Phase]:
    """Live bytes and phase after ``times`` passages; ``highest`` by phase is brought up to date."""
    begin = live
    risen: dict[Phase, int] = {}
    for allocation, sign, new_phase in steps:
        phase = new_phase or phase
        live += sign * sizes[allocation]
        if phase not in risen or live > risen[phase]:
            risen[phase] = live
    gained = live - begin
    for each, top in risen.items():
        top += max(0, (times - 1) * gained)
        if each not in highest or top > highest[each]:
            highest[each] = top
    return begin + times * gained, phase


def _stretches(recording: Recording, runs: Sequence[Sequence[tuple[str, ...]]]) -> list[_Stretch]:
    steps: list[_Step] = []
    owners: list[tuple[int, int, int] | None] = []  # by step: run, cycle, number of the span
    for number, cycles in enumerate(runs):
        passages = LayerCycles(recording, cycles)
        passages.check_alike()
        position = 0
        for order, span in enumerate(passages.spans):
            for item in span.items:
                if number == 0:
                    steps.append(_step(item))
                    owners.append(None)
                if span.cycle is not None:
                    owners[position] = (number, span.cycle, order)
                position += 1
    if not runs:
        passages = LayerCycles(recording, ())
        steps = [_step(item) for span in passages.spans for item in span.items]
        owners = [None] * len(steps)
    stretches = []
    for owner, members in groupby(zip(owners, steps, strict=True), key=lambda pair: pair[0]):
        run, cycle = (None, 0) if owner is None else owner[:2]
        stretches.append(_Stretch(run, cycle, tuple(step for _, step in members)))
    return stretches


def _step(item: Item) -> _Step:
    if item.what in ("birth", "death"):
        return _Step(item.allocation, 1 if item.what == "birth" else -1)
    return _Step(0, 0, item.phase if item.what == "phase" else None)

"""From a rehearsal with a few layers to that of the whole model, exactly. Pure, no torch.

A model of 32 equal layers repeats itself: every layer that plays the same role makes the same allocations and
releases them at the same point of its own or its neighbours' passage. So of a run of equal layers (or equal cycles of
layers, where kinds alternate) only four are rehearsed: the first, two in the middle and the last. If the two in the
middle are alike, event by event, with every release referring to the same allocation of the same neighbour, the
second of them is repeated as often as the model has it. If they are not, the run cannot be composed and
:class:`NotPeriodic` says so; the caller then rehearses the full depth.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from badam.blocks.names import enclosing
from badam.vocabulary import Phase
from badam_planner.composition.layer_cycles import (
    COMPARED,
    LAST,
    REPEATED,
    LayerCycles,
    NotPeriodic,
    Ordinal,
    Reference,
    Span,
    times_of_cycle,
)
from badam_planner.composition.renaming import Renamer, Work
from badam_planner.recording.recording import NEVER, Allocation, LayerMark, Recording

__all__ = ["KEPT_CYCLES", "NotPeriodic", "Run", "compose", "composed_work", "find_runs", "growth"]

_Cycle = TypeVar("_Cycle")

KEPT_CYCLES = LAST + 1
LONGEST_PERIOD = 8


@dataclass(frozen=True, slots=True)
class Run:
    """Equal cycles of layers (module paths). Of more than four, the first three and the last are rehearsed."""

    cycles: tuple[tuple[str, ...], ...]

    @property
    def left_out(self) -> dict[str, str]:
        """The layers that need not be rehearsed, each with an equal one that is."""
        return {
            layer: twin
            for cycle in self.cycles[KEPT_CYCLES - 1 : -1]
            for layer, twin in zip(cycle, self.cycles[REPEATED], strict=True)
        }

    def stand_ins(self) -> tuple[tuple[str, ...], ...]:
        """The names of the four cycles of a recording that is to be composed to this run.

        A run of two or three cycles has no use for some of the four; these get names that no layer has.
        """
        total, period = len(self.cycles), len(self.cycles[0])
        unused = [tuple(f"unused.{cycle}.{place}" for place in range(period)) for cycle in range(KEPT_CYCLES)]
        used = [self.cycles[n] if n < total - 1 else unused[n] for n in range(KEPT_CYCLES - 1)]
        return (*used, self.cycles[-1])


def find_runs(layers: Sequence[str], roles: Sequence[Hashable | None]) -> list[Run]:
    """The runs of at least two equal cycles, left to right, each as long as the layers allow.

    Args:
        layers: module paths in order of execution.
        roles: what each layer is and does; equal roles may stand for each other. None never may.
    """
    runs = []
    at = 0
    while at < len(layers):
        period, cycles = max(
            ((period, _repeats(roles, at, period)) for period in range(1, LONGEST_PERIOD + 1)),
            key=lambda found: (found[0] * (found[1] - 1), -found[0]),
        )
        if cycles < 2:
            at += 1
            continue
        starts = range(at, at + period * cycles, period)
        runs.append(Run(tuple(tuple(layers[start : start + period]) for start in starts)))
        at += period * cycles
    return runs


def _repeats(roles: Sequence[Hashable | None], at: int, period: int) -> int:
    first = roles[at : at + period]
    if len(first) < period or None in first:
        return 0
    count = 1
    while roles[at + count * period : at + (count + 1) * period] == first:
        count += 1
    return count


def compose(recording: Recording, run: Run) -> Recording:
    """The recording as it would be with every cycle of ``run`` present, and no other.

    Args:
        recording: has four cycles, under the names of ``run.stand_ins()``.
        run: any number of cycles from two on.

    Raises:
        NotPeriodic: if the two middle cycles of the recording are not alike.
    """
    return _Composer(recording, run).composed()


_Place = tuple[int, Ordinal] | int
"""An allocation of the composed recording: (cycle, ordinal) in the run, its index in the short recording outside."""


class _Composer:
    """Writes the composed recording, span by span."""

    def __init__(self, recording: Recording, run: Run) -> None:
        self.recording = recording
        self.run = run
        self.total = len(run.cycles)
        self.kept = run.stand_ins()
        self.cycle_of_layer = {layer: number for number, cycle in enumerate(self.kept) for layer in cycle}
        self.cycles = LayerCycles(recording, self.kept)
        self.output = Recording(
            flops=composed_work(recording.flops, run), traffic=composed_work(recording.traffic, run)
        )
        self.placed: dict[_Place, int] = {}  # index in the output, by place

    def composed(self) -> Recording:
        self.cycles.check_alike()
        spans = self.cycles.spans
        for position, span in enumerate(spans):
            if span.cycle == REPEATED:
                numbers = range(REPEATED, self.total - 1)
                ascending = spans[position - 1].cycle == COMPARED
                for number in numbers if ascending else reversed(numbers):
                    self._write(span, number)
            elif not _is_unused(span.cycle, self.total):
                self._write(span, self.total - 1 if span.cycle == LAST else span.cycle)
        return self.output

    def _write(self, span: Span, number: int | None) -> None:
        """Write a span as cycle ``number`` of the run, or as what it is if it belongs to no cycle."""
        out = self.output
        renamer = Renamer((), ())
        if span.cycle is not None and number is not None:
            renamer = Renamer(self.kept[span.cycle], self.run.cycles[number])
        for item in span.items:
            if item.what == "birth":
                self.placed[_place(item.allocation, item.reference, number)] = len(out.allocations)
                born = renamer.moved(self.recording.allocations[item.allocation], out.end, NEVER)
                out.allocations.append(self._grown(born) if born.shares else born)
            elif item.what == "death":
                self._release(_place(item.allocation, item.reference, number))
            elif item.what == "phase":
                out.phase_starts.append((out.end, item.phase))
            else:
                out.layer_marks.append(LayerMark(out.end, item.kind, renamer(item.layer)))
            out.end += 1

    def _grown(self, one: Allocation) -> Allocation:
        """What joins something of every layer, with the shares of the run's layers settled."""
        more = growth(one.shares, self.cycle_of_layer, lambda cycle: times_of_cycle(cycle, self.total))
        others = tuple((layer, nbytes) for layer, nbytes in one.shares if layer not in self.cycle_of_layer)
        return replace(one, shares=others, grown=one.grown + more)

    def _release(self, place: _Place) -> None:
        if place not in self.placed:
            raise NotPeriodic("a release has no allocation to refer to")
        self.output.allocations[self.placed[place]].died = self.output.end


def growth(
    shares: Iterable[tuple[str, int]], cycle_of_layer: Mapping[str, _Cycle], times: Callable[[_Cycle], int]
) -> int:
    """Bytes that an allocation gets on top of its own where cycles happen other than once each.

    Args:
        shares: bytes in it by layer.
        cycle_of_layer: the cycle of each layer that may be repeated.
        times: how often a cycle happens.
    """
    return sum((times(cycle_of_layer[layer]) - 1) * nbytes for layer, nbytes in shares if layer in cycle_of_layer)


def composed_work(work: Mapping[tuple[Phase, str], Work], run: Run) -> dict[tuple[Phase, str], Work]:
    """Work by phase and module with every cycle of ``run``: that of the second middle cycle counts repeatedly.

    Args:
        work: of four cycles, under the names of ``run.stand_ins()``.
        run: as for :func:`compose`.
    """
    kept, total = run.stand_ins(), len(run.cycles)
    cycle_of_layer = {layer: number for number, cycle in enumerate(kept) for layer in cycle}
    composed: dict[tuple[Phase, str], Work] = {}
    for (phase, module), count in work.items():
        cycle = cycle_of_layer.get(enclosing(module, cycle_of_layer))
        if not _is_unused(cycle, total):
            composed[phase, module] = count
        if cycle == REPEATED:
            for names in run.cycles[LAST:-1]:
                composed[phase, Renamer(kept[cycle], names)(module)] = count
    return composed


def _is_unused(cycle: int | None, total: int) -> bool:
    """Whether a cycle of the recording has no place in a run of ``total``."""
    return cycle is not None and times_of_cycle(cycle, total) == 0


def _place(allocation: int, reference: Reference | None, number: int | None) -> _Place:
    """Where an allocation of the recording is in the composed one, seen from cycle ``number``."""
    if reference is None or number is None:
        return allocation
    return (number + reference.distance, reference.ordinal)

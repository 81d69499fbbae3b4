"""From a rehearsal with a few layers to that of the whole model, exactly. Pure, no torch.

A model of 32 equal layers repeats itself: every layer that plays the same role makes the same allocations and
releases them at the same point of its own or its neighbours' passage. So of a run of equal layers (or equal cycles of
layers, where kinds alternate) only four are rehearsed: the first, two in the middle and the last. If the two in the
middle are alike, event by event, with every release referring to the same allocation of the same neighbour, the
second of them is repeated as often as the model has it. If they are not, the run cannot be composed and
:class:`NotPeriodic` says so; the caller then rehearses the full depth.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from badam.vocabulary import Phase
from badam_planner.events import GIVEN, NEVER, Allocation, LayerMark, Recording

KEPT_CYCLES = 4
LONGEST_PERIOD = 8

Kind = Literal["forward", "backward"]

_WITHIN: dict[Kind | None, tuple[Phase, ...]] = {
    None: tuple(Phase),
    "forward": (),
    "backward": (Phase.BACKWARD, Phase.RECOMPUTE),
}
"""The phases that may begin inside a layer's passage."""


class NotPeriodic(Exception):
    """Neighbouring layers of one role behave differently, so one cannot stand for the others."""


@dataclass(frozen=True, slots=True)
class Run:
    """Equal cycles of layers (module paths), of which the first three and the last are rehearsed."""

    cycles: tuple[tuple[str, ...], ...]

    @property
    def kept(self) -> tuple[tuple[str, ...], ...]:
        """The cycles that are rehearsed."""
        return (*self.cycles[: KEPT_CYCLES - 1], self.cycles[-1])

    @property
    def left_out(self) -> tuple[str, ...]:
        """The layers that are not."""
        return tuple(layer for cycle in self.cycles[KEPT_CYCLES - 1 : -1] for layer in cycle)


def find_runs(layers: Sequence[str], roles: Sequence[Hashable | None]) -> list[Run]:
    """The runs of equal cycles worth composing, longest saving first come first served, left to right.

    Args:
        layers: module paths in order of execution.
        roles: what each layer is and does; equal roles may stand for each other. None never may.
    """
    runs = []
    at = 0
    while at < len(layers):
        period, cycles = max(
            ((period, _repeats(roles, at, period)) for period in range(1, LONGEST_PERIOD + 1)),
            key=lambda found: (found[0] * (found[1] - KEPT_CYCLES), -found[0]),
        )
        if cycles <= KEPT_CYCLES:
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


def renamed(recording: Recording, names: Mapping[str, str]) -> Recording:
    """The recording of the same roles played by other layers: ``names`` maps module paths to module paths.

    What was there before the rehearsal, the parameters, keeps its names: all layers have theirs in the recording.
    """
    if all(old == new for old, new in names.items()):
        return recording
    pairs = tuple(names), tuple(names.values())

    def moved(allocation: Allocation) -> Allocation:
        if allocation.operation == GIVEN:
            return allocation
        label = allocation.label if allocation.label is None else _rename(allocation.label, *pairs)
        return replace(allocation, module=_rename(allocation.module, *pairs), label=label)

    return replace(
        recording,
        allocations=[moved(allocation) for allocation in recording.allocations],
        layer_marks=[replace(mark, layer=names.get(mark.layer, mark.layer)) for mark in recording.layer_marks],
        flops={(phase, _rename(module, *pairs)): count for (phase, module), count in recording.flops.items()},
    )


class _Item(NamedTuple):
    """One thing in the stream: a mark, the begin of a phase, a birth or a death."""

    what: Literal["mark", "phase", "birth", "death"]
    index: int = -1  # of the allocation
    phase: Phase | None = None
    kind: Kind | None = None
    layer: str = ""


@dataclass(slots=True)
class _Span:
    """A stretch of the stream: what happens in one cycle in one passage, or between cycles (``cycle`` None)."""

    cycle: int | None
    kind: Kind | None
    items: list[_Item]


_Ordinal = tuple[int, int]
"""Which allocation of a cycle: number of the passage through the cycle, number of the allocation in it.

Counted by passage because the last cycle's forward may go on into what follows the stack.
"""


class _Reference(NamedTuple):
    """An allocation seen from a cycle: how many cycles away it was born, and which one it is there."""

    distance: int
    ordinal: _Ordinal


def compose(recording: Recording, run: Run) -> Recording:
    """The recording as it would be with every cycle of ``run`` present.

    Raises:
        NotPeriodic: if the two middle cycles of the recording are not alike.
    """
    return _Composer(recording, run).composed()


_Place = tuple[int, _Ordinal] | int
"""An allocation of the composed recording: (cycle, ordinal) in the run, its index in the short recording outside."""


class _Composer:
    def __init__(self, recording: Recording, run: Run) -> None:
        self.recording = recording
        self.run = run
        self.total = len(run.cycles)
        self.cycle_of_layer = {layer: number for number, cycle in enumerate(run.kept) for layer in cycle}
        self.spans = self._cut(list(_stream(recording)))
        self.births: list[list[int]] = [[] for _ in run.kept]  # allocation indices by cycle
        self.home: dict[int, tuple[int, _Ordinal]] = {}  # allocation index -> cycle and place in it
        passages = [0] * len(run.kept)
        for span in self.spans:
            if span.cycle is not None:
                made = [item.index for item in span.items if item.what == "birth"]
                for place, index in enumerate(made):
                    self.home[index] = (span.cycle, (passages[span.cycle], place))
                self.births[span.cycle] += made
                passages[span.cycle] += 1

    # -- reading the recording

    def _cut(self, stream: list[_Item]) -> list[_Span]:
        """Spans begin where a layer begins and last until the next one does, or until the passage ends.

        So what Python releases between two layers belongs to the layer before, wherever the run has one.
        """
        spans = [_Span(None, None, [])]
        for item in stream:
            here = spans[-1]
            if item.what == "mark":
                cycle = self.cycle_of_layer.get(item.layer)
                if cycle is None or (here.cycle, here.kind) != (cycle, item.kind):
                    spans.append(_Span(cycle, item.kind if cycle is not None else None, []))
            elif item.phase is not None and item.phase not in _WITHIN[here.kind]:
                spans.append(_Span(None, None, []))
            spans[-1].items.append(item)
        return spans

    def _reference(self, index: int, cycle: int) -> _Reference | None:
        home = self.home.get(index)
        return None if home is None else _Reference(home[0] - cycle, home[1])

    def _portrait(self, cycle: int) -> list[object]:
        """What a cycle does, in terms that are equal for equal cycles."""
        names = self.run.kept[cycle]
        portrait: list[object] = []
        for span in self.spans:
            if span.cycle != cycle:
                continue
            portrait.append(span.kind)
            for item in span.items:
                if item.what == "birth":
                    born = self.recording.allocations[item.index]
                    module = _rename(born.module, names, tuple(f"#{n}" for n in range(len(names))))
                    portrait.append((born.nbytes, born.phase, module, born.operation, born.shape, born.dtype))
                elif item.what == "death":
                    reference = self._reference(item.index, cycle)
                    if reference is None or abs(reference.distance) > 1:
                        raise NotPeriodic(f"{names[0]} releases something made outside of its neighbourhood")
                    portrait.append(reference)
                elif item.what == "phase":
                    portrait.append(item.phase)
                else:
                    portrait.append((item.kind, names.index(item.layer)))
        portrait.append([self._outside_death(index) for index in self.births[cycle]])
        return portrait

    def _outside_death(self, index: int) -> str:
        """Whether an allocation of a cycle outlives the recording; where else it dies, the deaths above say."""
        return "never" if self.recording.allocations[index].died == NEVER else "dies"

    # -- writing the composed one

    def composed(self) -> Recording:
        if self._portrait(1) != self._portrait(2):
            raise NotPeriodic(f"{self.run.kept[1][0]} and {self.run.kept[2][0]} behave differently")
        self.output = Recording(flops=self._flops())
        self.placed: dict[_Place, int] = {}  # new index by place
        for span in self.spans:
            if span.cycle == 2 and span.kind == "backward":
                for number in range(self.total - 2, KEPT_CYCLES - 2, -1):
                    self._write(span, number)
            self._write(span, self._number(span.cycle))
            if span.cycle == 2 and span.kind == "forward":
                for number in range(KEPT_CYCLES - 1, self.total - 1):
                    self._write(span, number)
        return self.output

    def _number(self, cycle: int | None) -> int | None:
        """The cycle's number in the whole model."""
        return self.total - 1 if cycle == KEPT_CYCLES - 1 else cycle

    def _write(self, span: _Span, number: int | None) -> None:
        out = self.output
        for item in span.items:
            if item.what == "birth":
                self.placed[self._place(item.index, span, number)] = len(out.allocations)
                born = self._renamed(self.recording.allocations[item.index], span.cycle, number)
                out.allocations.append(replace(born, born=out.end, died=NEVER))
                out.end += 1
            elif item.what == "death":
                self._release(self._place(item.index, span, number))
                if span.cycle is None and self.home.get(item.index, (0, 0))[0] == 2:
                    for other in range(KEPT_CYCLES - 1, self.total - 1):
                        self._release((other, self.home[item.index][1]))
            elif item.what == "phase":
                assert item.phase is not None
                out.phase_starts.append((out.end, item.phase))
                out.end += 1
            else:
                assert item.kind is not None
                layer = item.layer if span.cycle is None else self._layer(item.layer, span.cycle, number)
                out.layer_marks.append(LayerMark(out.end, item.kind, layer))
                out.end += 1

    def _place(self, index: int, span: _Span, number: int | None) -> _Place:
        """Where an allocation of the recording is in the composed one, seen from cycle ``number``."""
        home = self.home.get(index)
        if home is None:
            return index
        if span.cycle is None or number is None:
            return (self.total - 1 if home[0] == KEPT_CYCLES - 1 else home[0], home[1])
        return (number + home[0] - span.cycle, home[1])

    def _release(self, place: _Place) -> None:
        if place not in self.placed:
            raise NotPeriodic("a release has no allocation to refer to")
        self.output.allocations[self.placed[place]].died = self.output.end
        self.output.end += 1

    def _layer(self, layer: str, cycle: int, number: int | None) -> str:
        assert number is not None
        return self.run.cycles[number][self.run.kept[cycle].index(layer)]

    def _renamed(self, allocation: Allocation, cycle: int | None, number: int | None) -> Allocation:
        if cycle is None or number is None or self.run.kept[cycle] == self.run.cycles[number]:
            return allocation
        names = self.run.kept[cycle], self.run.cycles[number]
        label = allocation.label if allocation.label is None else _rename(allocation.label, *names)
        return replace(allocation, module=_rename(allocation.module, *names), label=label)

    def _flops(self) -> dict[tuple[Phase, str], int]:
        flops = dict(self.recording.flops)
        model = self.run.kept[2]
        for (phase, module), count in self.recording.flops.items():
            if any(module == layer or module.startswith(f"{layer}.") for layer in model):
                for cycle in self.run.cycles[KEPT_CYCLES - 1 : -1]:
                    flops[phase, _rename(module, model, cycle)] = count
        return flops


def _stream(recording: Recording) -> Iterator[_Item]:
    """Everything that happened, in order."""
    timed = [(mark.tick, _Item("mark", kind=mark.kind, layer=mark.layer)) for mark in recording.layer_marks]
    timed += [(tick, _Item("phase", phase=phase)) for tick, phase in recording.phase_starts[1:]]
    for index, allocation in enumerate(recording.allocations):
        timed.append((allocation.born, _Item("birth", index)))
        if allocation.died != NEVER:
            timed.append((allocation.died, _Item("death", index)))
    timed.sort(key=lambda entry: entry[0])
    return (item for _, item in timed)


def _rename(text: str, old: Sequence[str], new: Sequence[str]) -> str:
    """``text`` with the first of the module paths in ``old`` that it contains replaced by its counterpart."""
    for before, after in zip(old, new, strict=True):
        start, found, rest = text.rpartition(before) if text.endswith(before) else text.partition(f"{before}.")
        if found and (not start or start.endswith(" ")):
            return f"{start}{after}{'.' if found.endswith('.') else ''}{rest}"
    return text

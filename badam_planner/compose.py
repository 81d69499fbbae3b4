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
    """Equal cycles of layers (module paths). Of more than four, the first three and the last are rehearsed."""

    cycles: tuple[tuple[str, ...], ...]

    @property
    def left_out(self) -> tuple[str, ...]:
        """The layers that need not be rehearsed."""
        return tuple(layer for cycle in self.cycles[KEPT_CYCLES - 1 : -1] for layer in cycle)

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


def renamed(recording: Recording, names: Mapping[str, str]) -> Recording:
    """The recording of the same roles played by other layers: ``names`` maps module paths to module paths.

    What was there before the rehearsal, the parameters, keeps its names: all layers have theirs in the recording.
    """
    if all(old == new for old, new in names.items()):
        return recording
    pairs = tuple(names), tuple(names.values())

    renamer = _Renamer(*pairs)

    def moved(one: Allocation) -> Allocation:
        return one if one.operation == GIVEN else _copy(one, renamer, one.born, one.died)

    return replace(
        recording,
        allocations=[moved(allocation) for allocation in recording.allocations],
        layer_marks=[replace(mark, layer=names.get(mark.layer, mark.layer)) for mark in recording.layer_marks],
        flops={(phase, renamer(module)): count for (phase, module), count in recording.flops.items()},
    )


class _Item(NamedTuple):
    """One thing in the stream: a mark, the begin of a phase, a birth or a death."""

    what: Literal["mark", "phase", "birth", "death"]
    allocation: int = -1  # its index in the recording
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
    """The recording as it would be with every cycle of ``run`` present, and no other.

    Args:
        recording: has four cycles, under the names of ``run.stand_ins()``.
        run: any number of cycles from two on.

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
        self.kept = run.stand_ins()
        self.cycle_of_layer = {layer: number for number, cycle in enumerate(self.kept) for layer in cycle}
        self.spans = self._cut(list(_stream(recording)))
        self.births: list[list[int]] = [[] for _ in self.kept]  # allocation indices by cycle
        self.home: dict[int, tuple[int, _Ordinal]] = {}  # allocation index -> cycle and place in it
        passages = [0] * len(self.kept)
        for span in self.spans:
            if span.cycle is not None:
                made = [item.allocation for item in span.items if item.what == "birth"]
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
        names = self.kept[cycle]
        anonymous = _Renamer(names, tuple(f"#{place}" for place in range(len(names))))
        portrait: list[object] = []
        for span in self.spans:
            if span.cycle != cycle:
                continue
            portrait.append(span.kind)
            for item in span.items:
                if item.what == "birth":
                    born = self.recording.allocations[item.allocation]
                    module = anonymous(born.module)
                    portrait.append((born.nbytes, born.phase, module, born.operation, born.shape, born.dtype))
                elif item.what == "death":
                    reference = self._reference(item.allocation, cycle)
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
            raise NotPeriodic(f"{self.kept[1][0]} and {self.kept[2][0]} behave differently")
        self.output = Recording(flops=self._flops())
        self.placed: dict[_Place, int] = {}  # new index by place
        for span in self.spans:
            if self._is_unused(span.cycle):
                continue
            if span.cycle == 2 and span.kind == "backward":
                for number in range(self.total - 2, KEPT_CYCLES - 2, -1):
                    self._write(span, number)
            self._write(span, self._number(span.cycle))
            if span.cycle == 2 and span.kind == "forward":
                for number in range(KEPT_CYCLES - 1, self.total - 1):
                    self._write(span, number)
        return self.output

    def _is_unused(self, cycle: int | None) -> bool:
        """Whether a cycle of the recording has no place in a run this short."""
        return cycle is not None and self.total - 1 <= cycle < KEPT_CYCLES - 1

    def _number(self, cycle: int | None) -> int | None:
        """The cycle's number in the whole model."""
        return self.total - 1 if cycle == KEPT_CYCLES - 1 else cycle

    def _write(self, span: _Span, number: int | None) -> None:
        out = self.output
        renamer = self._renamer(span.cycle, number)
        for item in span.items:
            if item.what == "birth":
                self.placed[self._place(item.allocation, span, number)] = len(out.allocations)
                out.allocations.append(_copy(self.recording.allocations[item.allocation], renamer, out.end, NEVER))
                out.end += 1
            elif item.what == "death":
                if (
                    span.cycle is None
                    and item.allocation in self.home
                    and self._is_unused(self.home[item.allocation][0])
                ):
                    continue
                self._release(self._place(item.allocation, span, number))
                if span.cycle is None and self.home.get(item.allocation, (0, 0))[0] == 2:
                    for other in range(KEPT_CYCLES - 1, self.total - 1):
                        self._release((other, self.home[item.allocation][1]))
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
        return self.run.cycles[number][self.kept[cycle].index(layer)]

    def _renamer(self, cycle: int | None, number: int | None) -> _Renamer:
        if cycle is None or number is None:
            return _Renamer((), ())
        return _Renamer(self.kept[cycle], self.run.cycles[number])

    def _flops(self) -> dict[tuple[Phase, str], int]:
        """Operations by phase and module: those of the second middle cycle also for the cycles that it stands for."""
        flops: dict[tuple[Phase, str], int] = {}
        for (phase, module), count in self.recording.flops.items():
            cycle = self._cycle_of(module)
            if not self._is_unused(cycle):
                flops[phase, module] = count
            if cycle == KEPT_CYCLES - 2:
                for names in self.run.cycles[KEPT_CYCLES - 1 : -1]:
                    flops[phase, _Renamer(self.kept[cycle], names)(module)] = count
        return flops

    def _cycle_of(self, module: str) -> int | None:
        while module and module not in self.cycle_of_layer:
            module = module.rpartition(".")[0]
        return self.cycle_of_layer.get(module)


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


class _Renamer:
    """Replaces the module path in a text by its counterpart; remembers, since few texts come often."""

    def __init__(self, old: Sequence[str], new: Sequence[str]) -> None:
        self._pairs = [pair for pair in zip(old, new, strict=True) if pair[0] != pair[1]]
        self._known: dict[str, str] = {}

    def __call__(self, text: str) -> str:
        if not self._pairs:
            return text
        known = self._known.get(text)
        if known is None:
            known = self._known[text] = self._replaced(text)
        return known

    def _replaced(self, text: str) -> str:
        """The text with the first of the old paths that it contains, whole or as the begin of a path, replaced."""
        for before, after in self._pairs:
            start, found, rest = text.rpartition(before) if text.endswith(before) else text.partition(f"{before}.")
            if found and (not start or start.endswith(" ")):
                return f"{start}{after}{'.' if found.endswith('.') else ''}{rest}"
        return text


def _copy(one: Allocation, renamer: _Renamer, born: int, died: int) -> Allocation:
    """The same allocation in another layer at another time. (dataclasses.replace would take half of the time here.)"""
    label = None if one.label is None else renamer(one.label)
    where = renamer(one.module)
    kind, card_only = one.category, one.card_only
    return Allocation(
        one.nbytes, born, died, one.phase, where, one.operation, one.shape, one.dtype, kind, label, card_only
    )

"""A recording cut into the forward and backward passes of four equal cycles of layers. Pure, no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple

from badam.blocks.names import enclosing
from badam.vocabulary import Category, Phase
from badam_planner.composition.renaming import Renamer
from badam_planner.recording.recording import GIVEN, NEVER, Recording

COMPARED, REPEATED, LAST = 1, 2, 3
"""The two cycles in the middle, which must be alike so that the second can be repeated, and the last one."""


def times_of_cycle(cycle: int, total: int) -> int:
    """How often one of a recording's four cycles happens in a run of ``total``: the second in the middle repeatedly."""
    if cycle == REPEATED:
        return max(0, total - LAST)
    return int(cycle == LAST or cycle < total - 1)


Kind = Literal["forward", "backward", "aside", "release"]

_WITHIN: dict[Kind | None, tuple[Phase, ...]] = {
    None: tuple(Phase),
    "forward": (),
    "backward": (Phase.BACKWARD, Phase.RECOMPUTE),
}
"""The phases that may begin inside a layer's passage."""


class NotPeriodic(Exception):
    """Neighbouring layers of one role behave differently, so one cannot stand for the others."""


Ordinal = tuple[int, int]
"""Which allocation of a cycle: number of the passage through the cycle, number of the allocation in it.

Counted by passage because the last cycle's forward may go on into what follows the stack; and in backward from the
passage's end, because the last cycle's backward may begin with what is left to do for what follows the stack.
"""


class Reference(NamedTuple):
    """An allocation seen from a cycle: how many cycles away it was born, and which one it is there."""

    distance: int
    ordinal: Ordinal


class Item(NamedTuple):
    """One thing that happened: a mark, the start of a phase, a birth or a death."""

    what: Literal["mark", "phase", "birth", "death"]
    allocation: int = -1  # its index in the recording
    reference: Reference | None = None  # to it, from the cycle that the item belongs to; None outside of cycles
    phase: Phase = Phase.SETUP
    kind: Literal["forward", "backward"] = "forward"
    layer: str = ""


@dataclass(slots=True)
class Span:
    """A stretch of the recording that belongs to one cycle, or to none (``cycle`` None).

    It is a cycle's passage forward or backward; or, outside of these, what is made for the cycle (such as an
    optimizer's states of its weights), or the release of what was made in or for it.
    """

    cycle: int | None
    kind: Kind | None
    items: list[Item]


class LayerCycles:
    """A recording cut into spans, with every birth and release in a cycle as seen from that cycle."""

    def __init__(self, recording: Recording, cycles: Sequence[tuple[str, ...]]) -> None:
        """Read a recording.

        Args:
            recording: what happened.
            cycles: the layers (module paths) of its four equal cycles.

        Raises:
            NotPeriodic: if a cycle releases what was made farther away than in its neighbours.
        """
        self._recording = recording
        self._cycles = cycles
        self._cycle_of_layer = {layer: number for number, cycle in enumerate(cycles) for layer in cycle}
        cut = self._cut(_stream(recording))
        spans = [part for span in cut for part in _parted(span, "aside", self._aside)]
        self._homes = _homes(spans, len(cycles), recording)
        parted = (part for span in spans for part in _parted(span, "release", self._released))
        self.spans = [self._seen(part) for part in parted]

    def cycle_of(self, module: str) -> int | None:
        """The cycle that a module lies in; None if it is in none."""
        return self._cycle_of_layer.get(enclosing(module, self._cycle_of_layer))

    def check_alike(self) -> None:
        """Refuse a recording whose two middle cycles differ, or in which something happens between them.

        Raises:
            NotPeriodic: with the layer where it was seen.
        """
        compared, repeated = self._cycles[COMPARED][0], self._cycles[REPEATED][0]
        if self._portrait(COMPARED) != self._portrait(REPEATED):
            raise NotPeriodic(f"{compared} and {repeated} behave differently")
        for before, span, after in zip(self.spans, self.spans[1:], self.spans[2:], strict=False):
            if span.cycle == REPEATED:
                beside = {other.cycle for other in (before, after) if other.kind == span.kind}
                if not beside >= ({COMPARED} if span.kind == "release" else {COMPARED, LAST}):
                    raise NotPeriodic(f"something happens between {repeated} and its neighbours")

    def _cut(self, stream: Iterator[Item]) -> list[Span]:
        """Spans begin where a layer begins and last until the next one does, or until the passage ends.

        So what Python releases between two layers belongs to the layer before, wherever the run has one.
        """
        spans = [Span(None, None, [])]
        for item in stream:
            here = spans[-1]
            if item.what == "mark":
                cycle = self._cycle_of_layer.get(item.layer)
                if cycle is None or (here.cycle, here.kind) != (cycle, item.kind):
                    spans.append(Span(cycle, item.kind if cycle is not None else None, []))
            elif item.what == "phase" and item.phase not in _WITHIN[here.kind]:
                spans.append(Span(None, None, []))
            spans[-1].items.append(item)
        return spans

    def _made_for(self, item: Item) -> int | None:
        """The cycle with the weight for which ``item`` is a birth, by its name; None if it is none."""
        if item.what != "birth":
            return None
        born = self._recording.allocations[item.allocation]
        if born.operation == GIVEN:  # what was there before is there for all layers
            return None
        if born.role is None:
            return self._cycle_of_layer.get(born.owner)
        return self.cycle_of(born.parameter)

    def _aside(self, items: Sequence[Item]) -> list[int | None]:
        """By item the cycle for which things are being made there, as for one layer after the other in an update.

        What dies meanwhile belongs there as well, whosever it was: a loop lets go of one layer's tensors when it has
        made the next one's. After the last thing that is made for a cycle this holds only if its neighbour's turn is
        next.
        """
        cycles: list[int | None] = [None] * len(items)
        last, making = 0, None  # the last birth, and for which cycle it was
        for place, item in enumerate(items):
            if item.what == "death":
                continue
            cycle = cycles[place] = self._made_for(item)
            if making is not None and cycle is not None and abs(cycle - making) <= 1:
                cycles[last:place] = [making] * (place - last)
            last, making = place, cycle
        return cycles

    def _released(self, items: Sequence[Item]) -> list[int | None]:
        """By item the cycle that made what it releases; None if it is no release, or of something else."""
        homes = (self._homes.get(item.allocation) if item.what == "death" else None for item in items)
        return [None if home is None else home[0] for home in homes]

    def _seen(self, span: Span) -> Span:
        """The span with its allocations as seen from its cycle."""
        if span.cycle is not None:
            for place, item in enumerate(span.items):
                if item.allocation >= 0:
                    span.items[place] = item._replace(reference=self._reference(item.allocation, span.cycle))
        return span

    def _reference(self, allocation: int, cycle: int) -> Reference | None:
        home = self._homes.get(allocation)
        if home is None:
            return None
        if abs(home[0] - cycle) > 1:
            raise NotPeriodic(f"{self._cycles[cycle][0]} releases what {self._cycles[home[0]][0]} made")
        return Reference(home[0] - cycle, home[1])

    def _portrait(self, cycle: int) -> list[object]:
        """What a middle cycle does, in terms that are equal for equal cycles."""
        names = self._cycles[cycle]
        anonymous = Renamer(names, tuple(f"#{place}" for place in range(len(names))))
        portrait: list[object] = []
        for span in self.spans:
            if span.cycle != cycle:
                continue
            portrait.append(span.kind)
            for item in span.items:
                if item.what == "mark":
                    portrait.append((item.kind, names.index(item.layer)))
                elif item.what == "phase":
                    portrait.append(item.phase)
                elif item.reference is None:
                    raise NotPeriodic(f"{names[0]} releases what no layer made")
                elif item.what == "death":
                    portrait.append(item.reference)
                else:
                    born = self._recording.allocations[item.allocation]
                    portrait.append((anonymous.moved(born, 0, 0), born.died == NEVER))
        return portrait


def _parted(span: Span, kind: Kind, cycles_of: Callable[[Sequence[Item]], list[int | None]]) -> Iterator[Span]:
    """A span outside of the cycles, with the items that belong to one by ``cycles_of`` as spans of their own."""
    if span.cycle is not None:
        yield span
        return
    pairs = zip(cycles_of(span.items), span.items, strict=True)
    for cycle, members in groupby(pairs, key=lambda pair: pair[0]):
        yield Span(cycle, None if cycle is None else kind, [item for _, item in members])


def _homes(spans: Sequence[Span], cycles: int, recording: Recording) -> dict[int, tuple[int, Ordinal]]:
    """By allocation that a cycle made: the cycle, and which one of the cycle's it is.

    A library's workspace is no cycle's: whichever comes first takes it.
    """
    shared = {index for index, one in enumerate(recording.allocations) if one.category is Category.WORKSPACE}
    homes: dict[int, tuple[int, Ordinal]] = {}
    passages = [0] * cycles
    for span in spans:
        if span.cycle is not None:
            made = [item.allocation for item in span.items if item.what == "birth" and item.allocation not in shared]
            begin = -len(made) if span.kind == "backward" else 0
            places = enumerate(made, begin)
            homes.update((index, (span.cycle, (passages[span.cycle], place))) for place, index in places)
            passages[span.cycle] += 1
    return homes


def _stream(recording: Recording) -> Iterator[Item]:
    """Everything that happened, in order."""
    timed = [(mark.tick, Item("mark", kind=mark.kind, layer=mark.layer)) for mark in recording.layer_marks]
    timed += [(tick, Item("phase", phase=phase)) for tick, phase in recording.phase_starts[1:]]
    for index, allocation in enumerate(recording.allocations):
        timed.append((allocation.born, Item("birth", index)))
        if allocation.died != NEVER:
            timed.append((allocation.died, Item("death", index)))
    timed.sort(key=lambda entry: entry[0])
    return (item for _, item in timed)

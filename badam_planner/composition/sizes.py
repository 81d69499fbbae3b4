"""One set of rehearsals for many sizes: how a recording grows with batch size and length. Pure, no torch.

The same code on a larger batch makes the same allocations, in the same order, of other sizes. Each number in a
recording (bytes of an allocation, operations of a module) then is (a S² + b S + c) Bⁱ, with batch size B and length S.
Recordings at three lengths of the smallest batch say which parabola it is; one of the largest batch at the greatest
length says which power, and proves both. All must be alike event by event. What does not fit is no family: its sizes
are rehearsed one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from badam.vocabulary import Phase
from badam_planner.recording.recording import Allocation, Recording, bytes_of, settled

GRID = 128
"""Lengths that are multiples of this can be a family: kernels round their scratch up to it."""

PROBES = 4
MOST_BATCH_POWER = 2

Size = tuple[int, int]
"""Batch size and length."""


class NoFamily(Exception):
    """Recordings of several sizes that do not follow from each other."""


@dataclass(frozen=True, slots=True)
class SizeRange:
    """The sizes from the smallest to the largest batch and length; ``middle`` are two lengths between the ends.

    A batch of one sequence runs other code than one of two (much is contiguous that else is not), so it is either the
    only batch size or not in the range.
    """

    few: int
    many: int
    short: int
    middle: tuple[int, int]
    long: int

    def probes(self) -> tuple[Size, ...]:
        """The sizes to rehearse: three lengths of the smallest batch and the corner that is farthest from them."""
        return (*((self.few, length) for length in (self.short, *self.middle)), (self.many, self.long))

    def has(self, size: Size) -> bool:
        """Whether a size is in the range."""
        return self.few <= size[0] <= self.many and self.short <= size[1] <= self.long and size[1] % GRID == 0


def ranges_of(batch_sizes: Sequence[int], lengths: Sequence[int]) -> tuple[SizeRange, ...]:
    """The ranges in which most of the given sizes lie, if that saves rehearsals: more than four lengths on the grid."""
    regular = sorted({length for length in lengths if length % GRID == 0})
    if len(regular) <= PROBES:
        return ()
    middle = len(regular) // 2
    ends = (regular[0], (regular[middle - 1], regular[middle]), regular[-1])
    several = sorted({batch for batch in batch_sizes if batch > 1})
    ranges = [SizeRange(1, 1, *ends)] if 1 in batch_sizes else []
    return (*ranges, SizeRange(several[0], several[-1], *ends)) if several else tuple(ranges)


@dataclass(frozen=True, slots=True)
class _Growth:
    """(square S² + factor S + rest) B^batch_power."""

    square: Fraction
    factor: Fraction
    rest: Fraction
    batch_power: int

    def exactly_at(self, size: Size) -> Fraction:
        """The number at a size, whole or not."""
        batch, length = size
        scale: int = batch**self.batch_power
        return ((self.square * length + self.factor) * length + self.rest) * scale

    def at(self, size: Size) -> int:
        """The number at a size.

        Raises:
            NoFamily: if it is no whole number.
        """
        number = self.exactly_at(size)
        if number.denominator != 1:
            raise NoFamily(f"{number} at {size}")
        return int(number)


@dataclass(frozen=True, slots=True)
class SizePattern:
    """What the recordings of a family have in common: their events, and by which law each number grows.

    Args:
        recording: that of the smallest size, without shapes and traffic; its allocations name their laws.
        flops_laws: of its operations, by phase and module.
    """

    recording: Recording
    flops_laws: dict[tuple[Phase, str], int]


class SizeFamily:
    """Recordings of one rehearsal for every size in a range."""

    def __init__(self, sizes: SizeRange, recordings: Mapping[Size, Recording]) -> None:
        """Read the recordings at the range's probes.

        Raises:
            NoFamily: if they are not alike, or a number grows in another way.
        """
        probed = [recordings[size] for size in sizes.probes()]
        first = probed[0]
        if any(_likeness(other) != _likeness(first) for other in probed[1:]):
            raise NoFamily("other events at other sizes")
        rows = list(zip(*(_numbers(recording) for recording in probed), strict=True))
        law_of = {row: number for number, row in enumerate(dict.fromkeys(rows))}
        self._growths = [_growth(row, sizes) for row in law_of]  # few: layers repeat each other's numbers
        laws = [law_of[row] for row in rows]
        allocations = [replace(one, shape=(), size_law=law) for one, law in zip(first.allocations, laws, strict=False)]
        flops_laws = dict(zip(first.flops, laws[len(allocations) :], strict=True))
        self.pattern = SizePattern(replace(first, allocations=allocations, traffic={}), flops_laws)

    def numbers_at(self, size: Size) -> list[int]:
        """The distinct numbers of the recording at a size, in the order of their laws.

        Raises:
            NoFamily: if one would not be whole.
        """
        return [growth.at(size) for growth in self._growths]

    def at(self, size: Size) -> Recording:
        """The recording of a rehearsal at ``size``. Shapes of tensors and traffic are not in it.

        Raises:
            NoFamily: if a number would not be whole.
        """
        return filled_in(self.pattern, self.numbers_at(size))


def filled_in(pattern: SizePattern, numbers: Sequence[int]) -> Recording:
    """A family's pattern, composed or not, with the ``numbers`` of one size for its own."""
    allocations = [_filled(one, numbers[one.size_law]) for one in pattern.recording.allocations]
    flops = {place: numbers[law] for place, law in pattern.flops_laws.items()}
    return settled(replace(pattern.recording, allocations=allocations, flops=flops))


def _filled(one: Allocation, number: int) -> Allocation:
    rows = one.rows if one.rule is None else number
    return replace(one, nbytes=bytes_of(one, number), rows=rows)


def _likeness(recording: Recording) -> tuple[object, ...]:
    """All that must be the same at every size."""
    events = [
        (one.born, one.died, one.phase, one.module, one.operation, one.dtype, one.category, one.role,
         one.parameter, one.state, one.gpu_only, one.owner, one.shares, one.rule, one.stream)
        for one in recording.allocations
    ]  # fmt: skip
    return events, recording.phase_starts, recording.layer_marks, list(recording.flops), recording.end


def _numbers(recording: Recording) -> Iterator[int]:
    """All that may grow."""
    yield from (one.nbytes if one.rule is None else one.rows for one in recording.allocations)
    yield from recording.flops.values()


def _growth(row: tuple[int, ...], sizes: SizeRange) -> _Growth:
    """What gives the numbers ``row`` at the probes: the parabola through three lengths, with the power that the far
    corner has it by. Only few powers are tried, so that any other growth is found out there.
    """
    square, factor, rest = _through((sizes.short, *sizes.middle), (row[0], row[1], row[2]))
    for power in range(1 if sizes.few == sizes.many else MOST_BATCH_POWER + 1):
        scale = sizes.few**power
        growth = _Growth(square / scale, factor / scale, rest / scale, power)
        if growth.exactly_at((sizes.many, sizes.long)) == row[-1]:
            return growth
    raise NoFamily(f"{row} at {sizes.probes()} grow in no simple way")


def _through(at: tuple[int, int, int], values: tuple[int, int, int]) -> tuple[Fraction, Fraction, Fraction]:
    """The parabola through three points: factors of the square, of the length, and what is left (Newton's form)."""
    (x, y, z), (first, second, third) = at, values
    slope = Fraction(second - first, y - x)
    square = (Fraction(third - second, z - y) - slope) / (z - x)
    return square, slope - square * (x + y), first - slope * x + square * x * y

"""The CUDA caching allocator with ``expandable_segments:True``: a few segments that grow by pages. Pure.

Source: the note on expandable segments and the comments in ``c10/cuda/CUDACachingAllocator.cpp`` of PyTorch 2.x. What
differs from the default (:mod:`badam_planner.recording.caching_allocator`):

* each pool is one range of addresses that is mapped where it is needed, in pages of 2 MiB (small pool) or 20 MiB;
* a request takes the smallest mapped free block that holds it, but one at the end of what is mapped counts as large as
  it could grow, so that blocks in between are used up first;
* if there is none, the lowest address is used from which free and unmapped ranges together have room, and what is
  missing there is mapped;
* whatever is at least 512 B is split off, in both pools;
* when a page cannot be mapped, all pages in which nothing is allocated are given back, also those within a range.

Not counted: more than one stream, and the end of the address space, which is an eighth larger than the card's memory.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from badam_planner.recording.caching_allocator import (
    MEDIUM_SEGMENT,
    ROUNDING,
    SMALL_REQUEST,
    SMALL_SEGMENT,
    AllocationRefused,
    SimulatedAllocator,
)

_ENDLESS = 1 << 62
"""Bytes of address space of a pool."""


@dataclass(slots=True, eq=False)
class _Range:
    """Addresses of one pool that are allocated, mapped and free, or not mapped; two of a kind never touch when free."""

    start: int
    size: int
    mapped: bool
    free: bool = True
    before: _Range | None = None
    after: _Range | None = None

    @property
    def could_be(self) -> int:
        """Its size if what follows were mapped too."""
        return self.size + (self.after.size if self.after is not None and not self.after.mapped else 0)

    def split(self, size: int) -> _Range:
        """Keep the first ``size`` bytes; returns the rest, of the same kind."""
        rest = _Range(self.start + size, self.size - size, self.mapped, self.free, self, self.after)
        if self.after is not None:
            self.after.before = rest
        self.after, self.size = rest, size
        return rest

    def absorb_next(self) -> None:
        """Become one with the range that follows."""
        assert self.after is not None
        self.size += self.after.size
        self.after = self.after.after
        if self.after is not None:
            self.after.before = self


@dataclass(slots=True)
class _Pool:
    """The ranges of one pool: those that are mapped and free by size, those that are not mapped by address."""

    page: int
    free: list[tuple[int, int]] = field(default_factory=list)
    unmapped: list[int] = field(default_factory=list)
    at: dict[int, _Range] = field(default_factory=dict)  # every free or unmapped range by its address

    def __post_init__(self) -> None:
        self.add(_Range(0, _ENDLESS, mapped=False))

    def add(self, item: _Range) -> None:
        self.at[item.start] = item
        if item.mapped:
            insort(self.free, (item.size, item.start))
        else:
            insort(self.unmapped, item.start)

    def remove(self, item: _Range) -> None:
        del self.at[item.start]
        if item.mapped:
            del self.free[bisect_left(self.free, (item.size, item.start))]
        else:
            del self.unmapped[bisect_left(self.unmapped, item.start)]

    def best_fit(self, size: int) -> _Range | None:
        place = bisect_left(self.free, (size, -1))
        if place == len(self.free):
            return None
        best = self.at[self.free[place][1]]
        for _, start in self.free[place + 1 :]:
            following = self.at[start]
            if following.could_be >= best.could_be:
                break
            best = following
        return best

    def growing_fit(self, size: int) -> _Range:
        """The lowest range that is free, or not mapped, and has room together with those behind it."""
        for start in self.unmapped:
            item = self.at[start]
            first = item.before if item.before is not None and item.before.free else item
            if any(room >= size for room in _rooms_from(first)):
                return first
        raise AssertionError("the last range is endless")

    def merged(self, item: _Range) -> _Range:
        """``item``, which is not listed, as one with its neighbours of the same kind; not listed either."""
        before, after = item.before, item.after
        if before is not None and before.free and before.mapped == item.mapped:
            self.remove(before)
            before.absorb_next()
            item = before
        if after is not None and after.free and after.mapped == item.mapped:
            self.remove(after)
            item.absorb_next()
        return item


class ExpandableAllocator(SimulatedAllocator[_Range, _Pool]):
    """A simulated allocator with segments that grow."""

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__(capacity)
        self._pools = {True: _Pool(SMALL_SEGMENT), False: _Pool(MEDIUM_SEGMENT)}

    def _take(self, size: int) -> tuple[_Range, _Pool]:
        pool = self._pools[size <= SMALL_REQUEST]
        item = pool.best_fit(size) or self._grow(pool, size)
        pool.remove(item)
        if item.size - size >= ROUNDING:
            pool.add(item.split(size))
        item.free = False
        return item, pool

    def _give_back(self, taken: _Range, pool: _Pool) -> None:
        taken.free = True
        pool.add(pool.merged(taken))

    def empty_cache(self) -> None:
        """Give back every page in which nothing is allocated."""
        for pool in self._pools.values():
            for _, start in list(pool.free):
                self._unmap(pool, pool.at[start])

    def layout(self) -> Hashable:
        """The free ranges by place, and what is reserved."""
        return self.reserved, *(tuple(pool.free) for pool in self._pools.values())

    def _grow(self, pool: _Pool, size: int) -> _Range:
        grown = self._try_to_grow(pool, size)
        if grown is None:
            self.releases += 1
            self.empty_cache()
            grown = self._try_to_grow(pool, size)
        if grown is None:
            raise AllocationRefused(f"{size} bytes are needed, {self.reserved} of {self.capacity} are mapped")
        return grown

    def _try_to_grow(self, pool: _Pool, size: int) -> _Range | None:
        item: _Range | None = pool.growing_fit(size)
        if item is not None and not item.mapped:
            item = self._map(pool, item, min(item.size, size))
        while item is not None and item.size < size:
            assert item.after is not None  # free ranges before one that is not mapped
            item = self._map(pool, item.after, min(item.after.size, size - item.size))
        return item

    def _map(self, pool: _Pool, item: _Range, size: int) -> _Range | None:
        """Map the first ``size`` bytes of ``item``, in whole pages; ``None`` if the card has not as many."""
        paged = -(-size // pool.page) * pool.page
        if not self._allows(paged):
            return None
        pool.remove(item)
        if paged < item.size:
            pool.add(item.split(paged))
        item.mapped = True
        item = pool.merged(item)
        pool.add(item)
        self._reserve(paged)
        return item

    def _unmap(self, pool: _Pool, item: _Range) -> None:
        first = -(-item.start // pool.page) * pool.page
        last = (item.start + item.size) // pool.page * pool.page
        if first >= last:
            return
        pool.remove(item)
        if item.start < first:
            item, kept = item.split(first - item.start), item
            pool.add(kept)
        if last < item.start + item.size:
            pool.add(item.split(last - item.start))
        item.mapped = False
        pool.add(pool.merged(item))
        self.reserved -= last - first


def _rooms_from(item: _Range | None) -> Iterator[int]:
    """How many bytes there are from ``item`` on, range by range, until one is allocated."""
    room = 0
    while item is not None and item.free:
        room += item.size
        yield room
        item = item.after

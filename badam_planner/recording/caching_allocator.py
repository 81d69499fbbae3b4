"""The CUDA caching allocator's rules, applied to a sequence of events: from allocated to reserved bytes. Pure.

Source: comments and constants of ``c10/cuda/CUDACachingAllocator.cpp`` in PyTorch 2.x (in 2.13 the constants are in
``c10/core/AllocatorConfig.h``), default settings, one stream.

* sizes are rounded up to 512 B;
* up to 1 MiB comes from the small pool, in segments of 2 MiB; the rest from the large pool: below 10 MiB in segments
  of 20 MiB, from there on in a segment of its own, rounded up to 2 MiB;
* a request takes the smallest free block that holds it, the lowest address among equals; the rest is split off if it
  is at least 512 B (small pool) or more than 1 MiB (large pool);
* a freed block merges with its free neighbours in the segment; segments stay reserved until ``empty_cache`` or until
  a new one cannot be reserved, when the entirely free ones are given back.

With ``expandable_segments`` the rules are others, see :mod:`badam_planner.recording.expandable_allocator`.

Not counted: more than one stream, ``max_split_size_mb``, ``garbage_collection_threshold`` and
rounding to powers of two, all of which are off by default. Where the driver puts a segment is not known: a segment's
address is its number, the first one being the lowest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from badam.units import MIB

ROUNDING = 512
SMALL_REQUEST = MIB
SMALL_SEGMENT = 2 * MIB
MEDIUM_SEGMENT = 20 * MIB
LARGE_REQUEST = 10 * MIB
LARGE_ROUNDING = 2 * MIB


class AllocationRefused(MemoryError):
    """The simulated card has no room for a segment, even after giving back every free one."""


@dataclass(slots=True, eq=False)
class _Block:
    """A range of a segment; neighbours are linked so that free ones can merge."""

    segment: int
    offset: int
    size: int
    free: bool = True
    previous: _Block | None = None
    following: _Block | None = None


@dataclass(slots=True)
class _Pool:
    """Free blocks of one pool, kept in the allocator's search order: size, then address."""

    small: bool
    free: list[tuple[int, int, int]] = field(default_factory=list)
    blocks: dict[tuple[int, int, int], _Block] = field(default_factory=dict)  # by entry of ``free``

    def add(self, block: _Block) -> None:
        entry = (block.size, block.segment, block.offset)
        insort(self.free, entry)
        self.blocks[entry] = block

    def remove(self, block: _Block) -> None:
        entry = (block.size, block.segment, block.offset)
        del self.free[bisect_left(self.free, entry)]
        del self.blocks[entry]

    def take_best_fit(self, size: int) -> _Block | None:
        """The smallest free block that holds ``size`` bytes, no longer among the free ones."""
        at = bisect_left(self.free, (size,))
        return self.blocks.pop(self.free.pop(at)) if at < len(self.free) else None


class Taken(Protocol):
    """A range of addresses."""

    size: int


TakenT = TypeVar("TakenT", bound=Taken)
PoolT = TypeVar("PoolT")


class SimulatedAllocator(ABC, Generic[TakenT, PoolT]):
    """What both kinds of segments share: requests under handles, and the account.

    Handles are whatever hashable the caller names its allocations by.

    Args:
        capacity: bytes that the card has to reserve; ``None`` for as many as are asked for.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.allocated = 0
        self.reserved = 0
        self.peak_allocated = 0
        self.peak_reserved = 0
        self.releases = 0
        """How often there was no room, and everything free went back."""
        self._held: dict[Hashable, tuple[TakenT, PoolT]] = {}

    def allocate(self, handle: Hashable, size: int) -> int:
        """Allocate ``size`` bytes under ``handle``; zero-sized requests take nothing.

        Returns:
            Bytes of the block that was taken: ``size`` rounded up, and what was too little to be split off.

        Raises:
            AllocationRefused: if ``capacity`` is set and does not allow what has to be reserved.
        """
        if size == 0:
            return 0
        held = self._held[handle] = self._take(-(-size // ROUNDING) * ROUNDING)
        taken = held[0].size
        self.allocated += taken
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        return taken

    def release(self, handle: Hashable) -> None:
        """Free what ``handle`` holds; it becomes available, and stays reserved."""
        held = self._held.pop(handle, None)
        if held is None:  # a zero-sized request holds nothing
            return
        taken, pool = held
        self.allocated -= taken.size
        self._give_back(taken, pool)

    @abstractmethod
    def empty_cache(self) -> None:
        """Give back everything in which nothing is allocated."""

    @abstractmethod
    def layout(self) -> Hashable:
        """What is free and where: what the allocator does next depends on nothing else."""

    @abstractmethod
    def _take(self, size: int) -> tuple[TakenT, PoolT]:
        """Find or reserve a block for ``size`` bytes, rounded already; it is no longer free."""

    @abstractmethod
    def _give_back(self, taken: TakenT, pool: PoolT) -> None:
        """Free a block, as one with its free neighbours."""

    def _allows(self, size: int) -> bool:
        return self.capacity is None or self.reserved + size <= self.capacity

    def _reserve(self, size: int) -> None:
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)


class CachingAllocator(SimulatedAllocator[_Block, _Pool]):
    """A simulated allocator with the usual segments."""

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__(capacity)
        self._small, self._large = _Pool(small=True), _Pool(small=False)
        self._pools = {True: self._small, False: self._large}
        self._segments: dict[int, int] = {}
        self._next_segment = 0

    def _take(self, size: int) -> tuple[_Block, _Pool]:
        pool = self._small if size <= SMALL_REQUEST else self._large
        block = pool.take_best_fit(size) or self._new_segment(_segment_size(size))
        rest = block.size - size
        if rest > SMALL_REQUEST or (rest >= ROUNDING and pool.small):
            following = block.following
            remainder = _Block(block.segment, block.offset + size, rest, True, block, following)
            if following is not None:
                following.previous = remainder
            block.following = remainder
            block.size = size
            pool.add(remainder)
        block.free = False
        return block, pool

    def _give_back(self, taken: _Block, pool: _Pool) -> None:
        block, before, after = taken, taken.previous, taken.following
        if before is not None and before.free:
            pool.remove(before)
            before.size += block.size
            before.following = after
            if after is not None:
                after.previous = before
            block = before
        if after is not None and after.free:
            pool.remove(after)
            block.size += after.size
            block.following = after.following
            if after.following is not None:
                after.following.previous = block
        block.free = True
        pool.add(block)

    def empty_cache(self) -> None:
        """Give back every segment in which nothing is allocated."""
        for pool in self._pools.values():
            for block in list(pool.blocks.values()):
                if block.size == self._segments[block.segment]:
                    pool.remove(block)
                    self.reserved -= self._segments.pop(block.segment)

    def layout(self) -> Hashable:
        """The free blocks by place, and what is reserved."""
        return self.reserved, tuple(self._small.free), tuple(self._large.free)

    def _new_segment(self, size: int) -> _Block:
        if not self._allows(size):
            self.releases += 1
            self.empty_cache()
        if self.capacity is not None and not self._allows(size):
            raise AllocationRefused(
                f"{size} bytes are needed, {self.capacity - self.reserved} of {self.capacity} are left"
            )
        block = _Block(self._next_segment, 0, size)
        self._segments[self._next_segment] = size
        self._next_segment += 1
        self._reserve(size)
        return block


def _segment_size(rounded: int) -> int:
    if rounded <= SMALL_REQUEST:
        return SMALL_SEGMENT
    if rounded < LARGE_REQUEST:
        return MEDIUM_SEGMENT
    return -(-rounded // LARGE_ROUNDING) * LARGE_ROUNDING

"""Live blocks of memory by address, kept by replaying events. Pure: knows neither torch nor the clock."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from badam.profiling.memory.source import Boundary, StepMemory
from badam.vocabulary import Category, Phase


@dataclass(slots=True)
class Block:
    """One block of memory; ACTIVATION until it is recognized as something else."""

    nbytes: int
    category: Category = Category.ACTIVATION


@dataclass(frozen=True, slots=True)
class Mark:
    """A point between two events: where a phase begins, where blocks at some addresses are recognized, or a boundary
    whose memory is asked for."""

    phase: Phase | None = None
    known: Mapping[int, Category] = field(default_factory=dict)
    boundary: bool = False


class Account:
    """Follows events of (address, bytes) and answers with the peak of what it followed."""

    def __init__(self) -> None:
        self.live_bytes = 0
        self._live: dict[int, Block] = {}
        self._whole: set[int] = set()  # addresses of mapped files
        self._phase = Phase.SETUP

    def take_in(self, address: int, nbytes: int, category: Category = Category.ACTIVATION) -> bool:
        """Count a block that no event reported; False if it is counted already."""
        if address in self._live or self.block_around(address) is not None:
            return False
        self._live[address] = Block(nbytes, category)
        self.live_bytes += nbytes
        return True

    def keep_whole(self, addresses: Iterable[int]) -> None:
        """From now on, take memory inside the live blocks that are around some of ``addresses`` for a part of them.

        Such a block is a file that is mapped: tensors have their memory anywhere in it.
        """
        begins = sorted(self._live)
        for address in addresses:
            index = bisect_right(begins, address) - 1
            if index >= 0 and begins[index] < address < begins[index] + self._live[begins[index]].nbytes:
                self._whole.add(begins[index])

    def block_around(self, address: int) -> tuple[int, int] | None:
        """Address and bytes of the block that holds ``address``, if it is one that :meth:`keep_whole` has found."""
        for begin in self._whole:
            block = self._live.get(begin)
            if block is not None and begin <= address < begin + block.nbytes:
                return begin, block.nbytes
        return None

    def release(self, address: int) -> Block | None:
        """Stop counting the block at ``address``, if there is one."""
        block = self._live.pop(address, None)
        if block is not None:
            self.live_bytes -= block.nbytes
        return block

    def recognize(self, known: Mapping[int, Category]) -> None:
        """Give live blocks the category that they turned out to have."""
        for address, category in known.items():
            block = self._live.get(address)
            if block is not None:
                block.category = category

    def forget_absent(self, present: Mapping[int, tuple[int, Category]], categories: Iterable[Category]) -> None:
        """Correct the account after a time in which nobody listened.

        Args:
            present: address, size and category of everything that exists of ``categories``.
            categories: those for which ``present`` is complete. Blocks of others are believed to be as they were,
                unless their address is in ``present``: then it was given away meanwhile.
        """
        complete = set(categories)
        for address, block in list(self._live.items()):
            here = present.get(address)
            if here is None:
                if block.category in complete:
                    self.release(address)
            elif here[0] != block.nbytes or (block.category not in complete):
                self.release(address)
            else:
                block.category = here[1]

    def replay(self, events: Iterable[tuple[int, int]], marks: Sequence[Mark]) -> StepMemory:
        """Follow events in order of time.

        Args:
            events: (address, change in bytes), in order of time; with a change of 0, address is the number of a mark.
            marks: those that the events refer to.
        """
        live, phase, total = self._live, self._phase, self.live_bytes  # local, and no calls: events come in thousands
        at_start = list(live.values())
        changes: list[tuple[Block, int]] = []
        peaks = {phase: total}
        highest = since_boundary = total
        changes_to_peak = 0
        boundaries: list[Boundary] = []
        for address, nbytes in events:
            if nbytes == 0:
                mark = marks[address]
                self.recognize(mark.known)
                phase = mark.phase or phase
                peaks[phase] = max(peaks.get(phase, -1), total)
                if mark.boundary:
                    boundaries.append(Boundary(total, since_boundary))
                    since_boundary = total
                continue
            # An address that is handed out again, or taken back, ends the life of the block that was there. One that is
            # taken back without having been counted was never ours.
            ended = live.pop(address, None)
            if ended is not None:
                total -= ended.nbytes
                changes.append((ended, -ended.nbytes))
            if nbytes > 0:
                live[address] = block = Block(nbytes)
                total += nbytes
                changes.append((block, nbytes))
                since_boundary = max(since_boundary, total)
                if total > peaks[phase]:
                    peaks[phase] = total
                    if total > highest:
                        highest, changes_to_peak = total, len(changes)
        self._phase, self.live_bytes = phase, total
        # Blocks are summed only now: some were recognized after the peak.
        by_category: dict[Category, int] = {}
        for block, change in (*((block, block.nbytes) for block in at_start), *changes[:changes_to_peak]):
            by_category[block.category] = by_category.get(block.category, 0) + change
        shares = {category: size for category, size in by_category.items() if size}
        return StepMemory(peaks, shares, boundaries=tuple(boundaries))

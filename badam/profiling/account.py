"""Live blocks of memory by address, kept by replaying events. Pure: knows neither torch nor the clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from badam.profiling.memory import Boundary, StepMemory
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
    """Follows events of (time, address, bytes) and answers with the peak of what it followed."""

    def __init__(self) -> None:
        self.live_bytes = 0
        self._live: dict[int, Block] = {}
        self._phase = Phase.SETUP

    def take_in(self, address: int, nbytes: int, category: Category = Category.ACTIVATION) -> bool:
        """Count a block that no event reported; False if it is counted already."""
        if address in self._live:
            return False
        self._live[address] = Block(nbytes, category)
        self.live_bytes += nbytes
        return True

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

    def replay(self, events: Iterable[tuple[int, int, int]], marks: Sequence[Mark]) -> StepMemory:
        """Follow events in order of time.

        Args:
            events: (time, address, change in bytes); with a change of 0, address is the number of a mark.
            marks: those that the events refer to.
        """
        at_start = list(self._live.values())
        changes: list[tuple[Block, int]] = []
        peaks = {self._phase: self.live_bytes}
        highest, changes_to_peak = self.live_bytes, 0
        boundaries: list[Boundary] = []
        since_boundary = self.live_bytes
        for _, address, nbytes in events:
            if nbytes == 0:
                mark = marks[address]
                self.recognize(mark.known)
                self._phase = mark.phase or self._phase
                if mark.boundary:
                    boundaries.append(Boundary(self.live_bytes, since_boundary))
                    since_boundary = self.live_bytes
            else:
                # An address that is handed out again, or taken back, ends the life of the block that was there. One
                # that is taken back without having been counted was never ours.
                ended = self.release(address)
                if ended is not None:
                    changes.append((ended, -ended.nbytes))
                if nbytes > 0:
                    self.take_in(address, nbytes)
                    changes.append((self._live[address], nbytes))
            since_boundary = max(since_boundary, self.live_bytes)
            if self.live_bytes > peaks.get(self._phase, -1):
                peaks[self._phase] = self.live_bytes
                if self.live_bytes > highest:
                    highest, changes_to_peak = self.live_bytes, len(changes)
        # Blocks are summed only now: some were recognized after the peak.
        by_category: dict[Category, int] = {}
        for block, change in (*((block, block.nbytes) for block in at_start), *changes[:changes_to_peak]):
            by_category[block.category] = by_category.get(block.category, 0) + change
        shares = {category: size for category, size in by_category.items() if size}
        return StepMemory(peaks, shares, boundaries=tuple(boundaries))

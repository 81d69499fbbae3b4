"""Allocated bytes on the CPU, to the byte, from the allocator's own reports.

Live bytes are a sum of reports, and nothing is estimated. Memory whose birth was not reported is taken in when
listening begins: tensors alive at the start and, where only some steps are measured, what was made in the others. Its
death is not reported either; a weak reference tells it. A file that weights are mapped from is reported as one block,
and the tensors inside are no memory besides.
"""

from __future__ import annotations

import gc
import time
import weakref
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from badam.profiling.memory.cpu_allocator_log import AllocatorEvent, AllocatorLog, Unreported
from badam.profiling.memory.source import Boundary, StepMemory
from badam.profiling.memory.states import NAMED, ModelStates, Named, live_cpu_tensors
from badam.tensors.dtensor import local_part
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


BOUNDARY = Mark(boundary=True)


class CpuMemory:
    """Measures the CPU memory of the thread that starts it; a badam.profiling.memory.source.MemorySource."""

    description = "the CPU allocator's own events (torch profiler, memory only)"
    costly = True

    def __init__(self) -> None:
        self._log = AllocatorLog()
        self._account = Account()
        self._marks: list[Mark] = []
        self._deaths: list[Unreported] = []  # of memory that was taken in
        self._states: ModelStates | None = None
        self._hook: RemovableHandle | None = None

    @property
    def live_bytes(self) -> int:
        """Bytes alive when the last measured step ended, or at :meth:`attach`."""
        return self._account.live_bytes

    def start(self) -> None:
        """Take in what is alive, and begin to listen."""
        gc.collect()  # what is garbage already is no part of the run
        self._log.start()
        self._take_in((tensor, Category.ACTIVATION) for tensor in live_cpu_tensors())

    def attach(self, states: ModelStates) -> None:
        """Learn the model and its optimizer."""
        self._read(self._log.drain(self._take_deaths()))
        self._states = states
        named = (*states.parameters(), *states.optimizer_states())
        self._account.keep_whole(one.address for one in named)
        self._take_in(named)
        self._account.recognize({address: category for address, (_, category) in self._blocks_of(named).items()})
        # The fp32 gradients of master copies live inside the optimizer's step only: the place to see them is its hook.
        self._hook = states.base_optimizer.register_step_pre_hook(self._base_step_begins)

    def begin_step(self, batch: Iterable[Tensor]) -> None:
        """Listen again, after :meth:`end_step` paused: correct the account, and take in the step's inputs."""
        if self._log.running or self._states is None:
            return
        self._log.start()
        for death in self._take_deaths():
            address, _ = death.event
            self._account.release(address)
        states = self._states
        named = (*states.parameters(), *states.optimizer_states(), *states.gradients())
        self._account.forget_absent(self._blocks_of(named), NAMED)
        self._take_in(chain(named, ((tensor, Category.ACTIVATION) for tensor in batch)))

    def phase_begins(self, phase: Phase) -> None:
        """Set a mark; once backward is over, with the gradients that it left."""
        self._set_mark(phase, self._states.gradients() if phase is Phase.STEP and self._states else ())

    def boundary(self) -> None:
        """Set a mark."""
        self._mark(BOUNDARY)

    def end_step(self, *, pause: bool) -> StepMemory:
        """Read the reports since the previous step's end, or since :meth:`begin_step`, and find the peak."""
        self._set_mark(None, self._states.optimizer_states() if self._states else ())
        deaths = self._take_deaths()
        return self._read(self._log.stop(deaths) if pause else self._log.drain(deaths))

    def stop(self) -> None:
        """Stop listening and let go of the optimizer."""
        self._log.stop()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _base_step_begins(self, *_: object) -> None:
        if self._states is not None and self._log.running:
            self._set_mark(None, self._states.gradients())

    def _take_deaths(self) -> list[Unreported]:
        deaths = self._deaths[:]
        del self._deaths[: len(deaths)]  # the list itself is what the weak references tell
        return deaths

    def _read(self, events: list[AllocatorEvent]) -> StepMemory:
        marks, self._marks = self._marks, []
        return self._account.replay(events, marks)

    def _set_mark(self, phase: Phase | None, named: Iterable[Named]) -> None:
        self._mark(Mark(phase, _by_address(named)))

    def _mark(self, mark: Mark) -> None:
        self._log.mark(len(self._marks))
        self._marks.append(mark)

    def _blocks_of(self, named: Iterable[Named]) -> dict[int, tuple[int, Category]]:
        """Address, size and category of the blocks that named tensors are in, or that are theirs alone."""
        found = {}
        for one in named:
            address, nbytes = self._account.block_around(one.address) or (one.address, one.nbytes)
            found[address] = nbytes, one.category
        return found

    def _take_in(self, tensors: Iterable[tuple[Tensor, Category]]) -> None:
        for tensor, category in tensors:
            storage = local_part(tensor).untyped_storage()
            address, nbytes = storage.data_ptr(), storage.nbytes()
            if nbytes and self._account.take_in(address, nbytes, category):
                finalizer = weakref.finalize(storage, _note_death, self._deaths, address, nbytes)
                finalizer.atexit = False


def _by_address(named: Iterable[Named]) -> dict[int, Category]:
    return {one.address: one.category for one in named}


def _note_death(deaths: list[Unreported], address: int, nbytes: int) -> None:
    deaths.append(Unreported(time.time_ns(), (address, -nbytes)))

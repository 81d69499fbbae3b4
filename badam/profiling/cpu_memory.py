"""Allocated bytes on the CPU, to the byte, from the allocator's own reports.

Every allocation and release is followed from :meth:`CpuMemory.start` on, so live bytes are a sum and nothing is
estimated. Memory that the allocator did not hand out while we listened is taken in once: tensors alive at the start,
and parameters that are mapped from a file. Each block of memory is an individual from its birth to its death, so what
is recognized later (a gradient, a master copy) is known at the peak too.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from badam.profiling.allocator_log import AllocatorEvent, AllocatorLog
from badam.profiling.memory import StepMemory
from badam.profiling.states import ModelStates, Storage, live_cpu_tensors
from badam.vocabulary import Category, Phase


class CpuMemory:
    """Measures the CPU memory of the thread that starts it; a badam.profiling.memory.MemorySource."""

    description = "the CPU allocator's own events (torch profiler, memory only), every step"

    def __init__(self) -> None:
        self._log = AllocatorLog()
        self._account = Account()
        self._marks: list[Mark] = []
        self._taken_in_deaths: list[AllocatorEvent] = []
        self._states: ModelStates | None = None
        self._hook: RemovableHandle | None = None

    @property
    def live_bytes(self) -> int:
        """Bytes alive when the last step ended, or at :meth:`attach`."""
        return self._account.live_bytes

    def start(self) -> None:
        """Take in what is alive, and begin to listen."""
        self._log.start()
        self._take_in(live_cpu_tensors())

    def attach(self, states: ModelStates) -> None:
        """Learn the model and its optimizer; parameters mapped from a file are taken in here."""
        self._read()
        self._states = states
        self._take_in((*states.model.parameters(), *states.model.buffers()))
        self._account.recognize((*states.parameters(), *states.optimizer_states()))
        # The fp32 gradients of master copies live inside the optimizer's step only: the place to see them is its hook.
        self._hook = states.base_optimizer.register_step_pre_hook(lambda *_: self._set_mark(None, states.gradients()))

    def phase_begins(self, phase: Phase) -> None:
        """Set a mark; once backward is over, with the gradients that it left."""
        self._set_mark(phase, self._states.gradients() if phase is Phase.STEP and self._states else ())

    def end_step(self) -> StepMemory:
        """Read the reports since the previous step's end and find the peak among them."""
        self._set_mark(None, self._states.optimizer_states() if self._states else ())
        return self._read()

    def stop(self) -> None:
        """Stop listening and let go of the optimizer."""
        self._log.stop()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _read(self) -> StepMemory:
        events = self._log.drain()
        if self._taken_in_deaths:
            events = sorted([*events, *self._taken_in_deaths], key=lambda event: event.time_ns)
            self._taken_in_deaths.clear()
        marks, self._marks = self._marks, []
        return self._account.replay(events, marks)

    def _set_mark(self, phase: Phase | None, known: Iterable[Storage]) -> None:
        self._log.mark(len(self._marks))
        self._marks.append(Mark(phase, tuple(known)))

    def _take_in(self, tensors: Iterable[Tensor]) -> None:
        """Count memory that was never reported; its release is not reported either, so a weak reference tells."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            address, nbytes = storage.data_ptr(), storage.nbytes()
            if nbytes and self._account.take_in(address, nbytes):
                finalizer = weakref.finalize(storage, _note_death, self._taken_in_deaths, address, nbytes)
                finalizer.atexit = False


@dataclass(slots=True)
class Block:
    """One block of memory; ACTIVATION until it is recognized as something else."""

    nbytes: int
    category: Category = Category.ACTIVATION


@dataclass(frozen=True, slots=True)
class Mark:
    """A point between two events: where a phase begins, or where some addresses are recognized."""

    phase: Phase | None
    known: tuple[Storage, ...] = ()


class Account:
    """Live blocks of memory by address, kept by replaying events."""

    def __init__(self) -> None:
        self.live_bytes = 0
        self._live: dict[int, Block] = {}
        self._phase = Phase.SETUP

    def take_in(self, address: int, nbytes: int) -> bool:
        """Count a block that no event reported; False if it is counted already."""
        if address in self._live:
            return False
        self._live[address] = Block(nbytes)
        self.live_bytes += nbytes
        return True

    def recognize(self, known: Iterable[Storage]) -> None:
        """Give live blocks the category that they turned out to have."""
        for storage in known:
            block = self._live.get(storage.address)
            if block is not None:
                block.category = storage.category

    def replay(self, events: Iterable[AllocatorEvent], marks: Sequence[Mark]) -> StepMemory:
        """Follow ``events``, in order of time, with the marks that they refer to by number."""
        at_start = list(self._live.values())
        changes: list[tuple[Block, int]] = []
        peaks = {self._phase: self.live_bytes}
        highest, changes_to_peak = self.live_bytes, 0
        for event in events:
            if event.nbytes == 0:
                mark = marks[event.address]
                self.recognize(mark.known)
                self._phase = mark.phase or self._phase
            else:
                self._apply(event, changes)
            peaks[self._phase] = max(peaks.get(self._phase, 0), self.live_bytes)
            if self.live_bytes > highest:
                highest, changes_to_peak = self.live_bytes, len(changes)
        by_category: dict[Category, int] = {}
        for block, change in (*((block, block.nbytes) for block in at_start), *changes[:changes_to_peak]):
            by_category[block.category] = by_category.get(block.category, 0) + change
        return StepMemory(peaks, {category: size for category, size in by_category.items() if size})

    def _apply(self, event: AllocatorEvent, changes: list[tuple[Block, int]]) -> None:
        # An address that is handed out again, or released, ends the life of the block that was there. A release of
        # something unknown is of memory that was never counted.
        ended = self._live.pop(event.address, None)
        if ended is not None:
            self.live_bytes -= ended.nbytes
            changes.append((ended, -ended.nbytes))
        if event.nbytes > 0:
            block = self._live[event.address] = Block(event.nbytes)
            self.live_bytes += block.nbytes
            changes.append((block, block.nbytes))


def _note_death(deaths: list[AllocatorEvent], address: int, nbytes: int) -> None:
    deaths.append(AllocatorEvent(time.time_ns(), address, -nbytes))

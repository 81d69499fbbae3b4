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
from collections.abc import Iterable
from itertools import chain

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from badam.profiling.memory.account import Account, Mark
from badam.profiling.memory.cpu_allocator_log import AllocatorEvent, AllocatorLog, Unreported
from badam.profiling.memory.source import StepMemory
from badam.profiling.memory.states import NAMED, ModelStates, Named, live_cpu_tensors
from badam.tensors.dtensor import local_part
from badam.vocabulary import Category, Phase

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

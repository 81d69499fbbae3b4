"""The CPU allocator's own account of every block of memory it hands out and takes back.

torch's CPU allocator reports to the profiler, and to nobody else. :class:`AllocatorLog` starts that profiler for
memory alone: it records no operators and no ranges, so that its cost is that of the allocations (some microseconds
each). It sees what the thread that started it allocates; backward on the CPU runs in that thread.

Recording no ranges is also what makes it safe to stop and start at any point: the profiler keeps a pointer into its
session for each open range, and closing a range that was opened in an earlier session writes through it.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch._C._autograd import _disable_profiler, _enable_profiler, _prepare_profiler, _profiler_enabled
from torch._C._profiler import (
    ProfilerActivity,
    ProfilerConfig,
    ProfilerState,
    RecordScope,
    _EventType,
    _ExperimentalConfig,
)

from badam.errors import BadamError

MARK_BYTES = 8191
"""A mark is an allocation of this size at a known address, released at once: so marks and allocations are in one
order without comparing clocks. A prime, since tensors of numbers have even sizes."""


class AllocatorEvent(NamedTuple):
    """One thing that happened: a block handed out or taken back, or a mark.

    ``nbytes`` is positive for an allocation, negative for a release and zero for mark number ``address``.
    """

    time_ns: int  # since the Unix epoch
    address: int
    nbytes: int


class AllocatorLog:
    """Collects the allocator's reports from :meth:`start` to :meth:`stop`."""

    def __init__(self) -> None:
        self.running = False
        self._marks: list[tuple[int, int]] = []  # address and number

    def start(self) -> None:
        """Begin to listen.

        Raises:
            BadamError: if torch's profiler is in use in this thread already; there is one per thread.
        """
        if _profiler_enabled():
            raise BadamError(
                "Memory cannot be measured: torch's profiler is already running in this thread.",
                advice="Record either with badam.profiling or with torch.profiler, not with both at once.",
            )
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its start and stop messages are no news to a user
        _prepare_profiler(_config(), {ProfilerActivity.CPU})
        # torch's stub leaves out the last parameter, the kinds of ranges to record: one that training does not have.
        no_ranges = {RecordScope.STATIC_RUNTIME_MODEL}
        _enable_profiler(_config(), {ProfilerActivity.CPU}, no_ranges)  # type: ignore[call-arg]
        self.running = True
        atexit.register(self.stop)  # a process that ends with the profiler on crashes

    def mark(self, number: int) -> None:
        """Set mark ``number`` between what was allocated before and what comes."""
        probe = torch.empty(MARK_BYTES, dtype=torch.uint8, device="cpu")
        self._marks.append((probe.data_ptr(), number))

    def drain(self) -> list[AllocatorEvent]:
        """What was reported since the last call, in order of time; goes on listening."""
        with _no_collection():  # between stop and start nobody listens, and a collection would release tensors unseen
            result = _disable_profiler()
            atexit.unregister(self.stop)
            self.start()
            return self._events(result)

    def stop(self) -> list[AllocatorEvent]:
        """What was reported since the last call; ends listening. Does nothing if it had ended."""
        if not self.running:
            return []
        self.running = False
        atexit.unregister(self.stop)
        with _no_collection():
            return self._events(_disable_profiler())

    def _events(self, result: Any) -> list[AllocatorEvent]:
        reports = [
            (node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size)
            for node in result.experimental_event_tree()
            if node.tag == _EventType.Allocation and node.extra_fields.device.type == "cpu"
        ]
        reports.sort(key=lambda report: report[0])
        marks, self._marks = deque(self._marks), []
        events: list[AllocatorEvent] = []
        for time_ns, address, nbytes in reports:
            if marks and nbytes == MARK_BYTES and address == marks[0][0]:
                address, nbytes = marks.popleft()[1], 0
            events.append(AllocatorEvent(time_ns, address, nbytes))
        return events


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection: reading makes ten thousands of objects without cycles, and would set it off each time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _config() -> ProfilerConfig:
    return ProfilerConfig(
        ProfilerState.KINETO,
        False,  # report_input_shapes
        True,  # profile_memory
        False,  # with_stack
        False,  # with_flops
        False,  # with_modules
        _ExperimentalConfig(),
    )

"""The CPU allocator's own account of every block of memory it hands out and takes back.

torch's CPU allocator reports to the profiler, and to nobody else. :class:`AllocatorLog` starts that profiler for
memory alone: it records no operators and no ranges, so that its cost is that of the allocations (some microseconds
each). It sees what the thread that started it allocates; backward on the CPU runs in that thread, and threads that
send messages leave it the releases, see :func:`messages_released_here`.

Recording no ranges is also what makes it safe to stop and start at any point: the profiler keeps a pointer into its
session for each open range, and closing a range that was opened in an earlier session writes through it.
"""

from __future__ import annotations

import atexit
import functools
import gc
import os
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._C._autograd import _disable_profiler, _enable_profiler, _prepare_profiler, _profiler_enabled
from torch._C._profiler import (
    ProfilerActivity,
    ProfilerConfig,
    ProfilerState,
    RecordScope,
    _ExperimentalConfig,
    _ExtraFields_Allocation,
)

from badam.errors import BadamError

PATIENCE_SECONDS = 0.2
"""After this training goes on: it is right in any case, only what is reported of memory may then be too much."""

MOMENT_SECONDS = 2e-4

THREADS = Path("/proc/self/task")
"""A directory for each thread of this process, on Linux."""


@contextmanager
def messages_released_here() -> Iterator[None]:
    """Within, waiting for a message of gloo's ends when its thread has let go of everything.

    gloo sends in threads of its own, which hold on to a message's tensors for a moment after it has arrived. If such a
    thread is the last to let go of a buffer, the allocator reports that to nobody, and the buffer is taken for alive.
    So while allocations are listened to, whoever has waited for a message waits until no other thread has anything to
    do. Which buffers it was is not known: gloo sums in copies that only it sees.
    """
    if not dist.is_available() or not dist.is_initialized() or "gloo" not in dist.get_backend():
        yield
        return
    usual = dist.Work.wait

    @functools.wraps(usual)
    def wait(work: dist.Work, *timeout: Any, **options: Any) -> bool:
        arrived: bool = usual(work, *timeout, **options)
        _wait_for_other_threads()
        return arrived

    dist.Work.wait = wait  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        dist.Work.wait = usual  # type: ignore[method-assign]


def _wait_for_other_threads() -> None:
    if not THREADS.is_dir():
        time.sleep(10 * MOMENT_SECONDS)
        return
    deadline = time.monotonic() + PATIENCE_SECONDS
    time.sleep(MOMENT_SECONDS)
    while _others_run() and time.monotonic() < deadline:
        time.sleep(MOMENT_SECONDS)


def _others_run() -> bool:
    """Whether another thread runs, or would if it had a core."""
    own = str(threading.get_native_id())
    for thread in THREADS.iterdir():
        if thread.name != own:
            try:
                state = (thread / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:  # it has ended meanwhile
                continue
            if state == "R":
                return True
    return False


MARK_BYTES = 8191
"""A mark is an allocation of this size at a known address, released at once: so marks and allocations are in one
order without comparing clocks. A prime, since tensors of numbers have even sizes."""


AllocatorEvent = tuple[int, int]
"""One thing that happened, as (address, bytes): a block handed out, or taken back where the bytes are negative. With no
bytes it is a mark, and its number in place of the address. A plain tuple, since a step has ten thousands of them."""


class Unreported(NamedTuple):
    """Something that happened without a report, and when, in nanoseconds since the Unix epoch."""

    time_ns: int
    event: AllocatorEvent


class AllocatorLog:
    """Collects the allocator's reports from :meth:`start` to :meth:`stop`."""

    def __init__(self) -> None:
        self.running = False
        self._marks: list[tuple[int, int]] = []  # address and number
        self._messages = ExitStack()

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
        if not self.running:
            self._messages.enter_context(messages_released_here())
        self.running = True
        atexit.register(self.stop)  # a process that ends with the profiler on crashes

    def mark(self, number: int) -> None:
        """Set mark ``number`` between what was allocated before and what comes."""
        probe = torch.empty(MARK_BYTES, dtype=torch.uint8, device="cpu")
        self._marks.append((probe.data_ptr(), number))

    def drain(self, unreported: Sequence[Unreported] = ()) -> list[AllocatorEvent]:
        """What was reported since the last call, in order of time, with ``unreported`` in its place; goes on."""
        with _no_collection():  # between stop and start nobody listens, and a collection would release tensors unseen
            result = _disable_profiler()
            atexit.unregister(self.stop)
            self.start()
            return self._events(result, unreported)

    def stop(self, unreported: Sequence[Unreported] = ()) -> list[AllocatorEvent]:
        """What :meth:`drain` returns; ends listening. Does nothing if it had ended."""
        if not self.running:
            return []
        self.running = False
        self._messages.close()
        atexit.unregister(self.stop)
        with _no_collection():
            return self._events(_disable_profiler(), unreported)

    def _events(self, result: Any, unreported: Sequence[Unreported]) -> list[AllocatorEvent]:
        nodes: list[Any] = result.experimental_event_tree()  # in order of time
        marks, self._marks = deque(self._marks), []
        events: list[AllocatorEvent] = []
        others = torch.cuda.is_initialized()  # devices whose allocators report to the profiler too
        for begin, end, then in _stretches(nodes, unreported):
            for node in nodes[begin:end]:
                fields = node.extra_fields  # each look into a node makes an object, so there are no more than needed
                if type(fields) is not _ExtraFields_Allocation or (others and fields.device.type != "cpu"):
                    continue
                address, nbytes = fields.ptr, fields.alloc_size
                if nbytes == MARK_BYTES and marks and address == marks[0][0]:
                    address, nbytes = marks.popleft()[1], 0
                events.append((address, nbytes))
            events += then
        return events


def _stretches(
    nodes: Sequence[Any], unreported: Sequence[Unreported]
) -> Iterator[tuple[int, int, list[AllocatorEvent]]]:
    """Begin and end of the reports between two unreported events, with the event that follows them."""
    begin = 0
    for one in sorted(unreported, key=lambda one: one.time_ns):
        end = bisect_right(nodes, one.time_ns, lo=begin, key=lambda node: node.start_time_ns)
        yield begin, end, [one.event]
        begin = end
    yield begin, len(nodes), []


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

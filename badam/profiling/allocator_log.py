"""The CPU allocator's own account of every block of memory it hands out and takes back.

torch's CPU allocator reports to the profiler, and to nobody else. :class:`AllocatorLog` starts that profiler for
memory alone: of the operators it records none, only the marks that the caller sets, so that its cost is that of the
allocations (some microseconds each) and not that of the operators. It sees what the thread that started it allocates;
backward on the CPU runs in that thread.
"""

from __future__ import annotations

import atexit
import gc
import os
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

_MARK = "badam.mark."


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
        # torch's stub leaves out the last parameter, which restricts the record to user ranges and memory.
        _enable_profiler(_config(), {ProfilerActivity.CPU}, {RecordScope.USER_SCOPE})  # type: ignore[call-arg]
        self.running = True
        atexit.register(self.stop)  # a process that ends with the profiler on crashes

    def mark(self, number: int) -> None:
        """Set mark ``number`` between what was allocated before and what comes."""
        with torch.profiler.record_function(f"{_MARK}{number}"):
            pass

    def drain(self) -> list[AllocatorEvent]:
        """What was reported since the last call, in order of time; goes on listening."""
        with _no_collection():  # between stop and start nobody listens, and a collection would release tensors unseen
            result = _disable_profiler()
            atexit.unregister(self.stop)
            self.start()
            return _sorted_events(result)

    def stop(self) -> list[AllocatorEvent]:
        """What was reported since the last call; ends listening. Does nothing if it had ended."""
        if not self.running:
            return []
        self.running = False
        atexit.unregister(self.stop)
        with _no_collection():
            return _sorted_events(_disable_profiler())


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


def _sorted_events(result: Any) -> list[AllocatorEvent]:
    return sorted(_walk(result.experimental_event_tree()), key=lambda event: event.time_ns)


def _walk(nodes: list[Any]) -> Iterator[AllocatorEvent]:
    """The tree's events: user ranges, such as the one that torch puts around an optimizer's step, have children."""
    for node in nodes:
        if node.tag == _EventType.Allocation:
            fields = node.extra_fields
            if fields.device.type == "cpu":
                yield AllocatorEvent(node.start_time_ns, fields.ptr, fields.alloc_size)
        elif node.name.startswith(_MARK):
            yield AllocatorEvent(node.start_time_ns, int(node.name.removeprefix(_MARK)), 0)
        if node.children:
            yield from _walk(node.children)

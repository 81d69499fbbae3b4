"""Messages between processes on the CPU: what was held for one is released in the thread whose reports are read.

gloo sends in threads of its own, which hold on to a message's tensors for a moment after it has arrived. If such a
thread is the last to let go of a buffer, the allocator reports that to nobody, and the buffer is taken for alive. So
while allocations are listened to, whoever has waited for a message waits until no other thread has anything to do.
Which buffers it was is not known: gloo sums in copies that only it sees.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

PATIENCE_SECONDS = 0.2
"""After this training goes on: it is right in any case, only what is reported of memory may then be too much."""

MOMENT_SECONDS = 2e-4

THREADS = Path("/proc/self/task")
"""A directory for each thread of this process, on Linux."""


@contextmanager
def messages_released_here() -> Iterator[None]:
    """Within, waiting for a message of gloo's ends when its thread has let go of everything."""
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

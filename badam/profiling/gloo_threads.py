"""Messages between processes on the CPU: what was held for one is released in the thread whose reports are read.

gloo sends in threads of its own, which hold on to a message's tensors for a moment after it has arrived. If such a
thread is the last to let go of a buffer, the allocator reports that to nobody, and the buffer is taken for alive. So
while allocations are listened to, whoever has waited for a message waits a moment more. Which buffers it was is not
known: gloo sums in copies that only it sees.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

MOMENT_SECONDS = 2e-3
"""Long enough for a thread that has nothing left to do but let go, also where there are more of them than cores."""


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
        time.sleep(MOMENT_SECONDS)
        return arrived

    dist.Work.wait = wait  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        dist.Work.wait = usual  # type: ignore[method-assign]

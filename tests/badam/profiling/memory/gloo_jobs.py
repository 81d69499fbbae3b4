"""What processes that send over gloo run while the allocator is listened to."""

from __future__ import annotations

import torch
import torch.distributed as dist

from badam.profiling.memory.cpu_allocator_log import AllocatorLog

MESSAGES = 100


def bytes_left_after_messages() -> dict[str, int]:
    """By kind of message, what is taken for alive when everything that was made for many of them is gone."""
    count = dist.get_world_size()
    left = {}

    def gather() -> None:
        dist.all_gather_into_tensor(torch.empty(1000 * count), torch.ones(1000))

    def reduce_scatter() -> None:
        dist.reduce_scatter_tensor(torch.empty(1000), torch.ones(1000 * count))

    def all_reduce() -> None:
        dist.all_reduce(torch.ones(1000))

    def awaited_later() -> None:
        work = dist.all_reduce(torch.ones(1000), async_op=True)
        assert work is not None
        work.wait()

    for send in (gather, reduce_scatter, all_reduce, awaited_later):
        log = AllocatorLog()
        log.start()
        for _ in range(MESSAGES):
            send()
        left[send.__name__] = sum(nbytes for _, nbytes in log.stop())
    return left


def wait_before_and_after() -> bool:
    """Whether waiting is torch's own again when nobody listens any more."""
    usual = dist.Work.wait
    log = AllocatorLog()
    log.start()
    log.drain()
    changed = dist.Work.wait is not usual
    log.stop()
    return changed and dist.Work.wait is usual

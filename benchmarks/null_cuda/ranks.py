"""One process as the first of several on the null device; the others are not there.

Its process group is PyTorch's own for NCCL, with the streams and the memory that collectives take in it; NCCL itself is
served by the null device, where a collective sends nothing and changes nothing. Groups that compare on the host what
processes hold are fakes, in which everybody agrees.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist


def join(world_size: int) -> None:
    """Become process 0 of ``world_size``. Each has a null device of its own, so this one's is the first."""
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  # its import makes the backend known

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}  # as torchrun sets them
    torch.cuda.set_device(0)
    # Nothing but the key of a communicator goes through the store, and process 0 is the one that writes it.
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=world_size)
    real = dist.new_group

    def new_group(ranks: Any = None, timeout: Any = None, backend: Any = None, *args: Any, **options: Any) -> Any:
        return real(ranks, timeout, "fake" if backend == "gloo" else backend, *args, **options)

    dist.new_group = dist.distributed_c10d.new_group = new_group

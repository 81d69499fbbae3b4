"""What the communication library takes on a GPU, outside torch's allocator. Pure.

An assumption like the device context: nobody has measured it for this project.
"""

from __future__ import annotations

from badam.plan import Target

MIB = 2**20

PAIR_BYTES, GROUP_BYTES = 544 * MIB, 688 * MIB
"""One NCCL communicator of two GPUs, and one of more.

Measured by others on four A100 with NVLink: https://github.com/NVIDIA/nccl/issues/964. By NCCL's authors it is
proportional to the number of communicators and to that of channels, of which slower links have fewer, and beyond two
machines no longer grows with the number of GPUs: https://github.com/NVIDIA/nccl/issues/864.
"""


def with_nccl(target: Target) -> Target:
    """``target`` with what NCCL is assumed to take on each of its GPUs; see :func:`nccl_bytes`."""
    return target.model_copy(update={"communication_bytes": nccl_bytes(target)})


def nccl_bytes(target: Target) -> int:
    """Bytes that NCCL is assumed to take on each GPU.

    Formula: for each communicator 544 MiB if it joins two GPUs, else 688 MiB. None on the CPU, where gloo's buffers
    are in passing.
    Source: see :data:`GROUP_BYTES`.
    Not counted: how many channels the links of this machine get, NCCL_BUFFSIZE and other settings of NCCL, buffers that
    it makes for messages that it sends in other ways than rings and trees.
    """
    if target.gpu == "cpu":
        return 0
    return sum(PAIR_BYTES if size == 2 else GROUP_BYTES for size in communicators(target))


def communicators(target: Target) -> tuple[int, ...]:
    """By communicator, how many GPUs it joins: all; and with several cut copies those of one, and one of each."""
    if target.num_gpus == 1:
        return ()
    if target.replicas == 1 or target.shards == 1:
        return (target.num_gpus,)
    return (target.num_gpus, target.shards, target.replicas)

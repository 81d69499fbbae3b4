"""What gloo, which carries the messages of processes on the CPU, takes from torch's allocator meanwhile. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from badam_planner.multi_gpu.slots import MessageSlot
from badam_planner.recording.recording import Allocation, TensorRole

GATHERED_INTO = (TensorRole.GATHER_BUFFER, TensorRole.GATHERED_MATRICES)


def gloos_copies(allocations: Iterable[Allocation]) -> Iterator[Allocation]:
    """A copy of each message, in passing: gloo gathers into a tensor of its own, and sums in one.

    Formula: as many bytes as the buffer that is gathered into, or as the input of the reduction, from when that is
    there until the message has arrived. What a reduction leaves has its memory by then.
    Source: the allocator's reports of one gather and one reduction; steps are compared with them in
    tests/badam_planner/rehearsal/test_over_gloo.py.
    Not counted: what gloo takes from the system without torch's allocator; that ZeRO-3 asks for messages ahead, so
    that a copy may be there at another time.
    """
    for message in allocations:
        if message.role is TensorRole.REDUCTION_INPUT:
            yield replace(
                _copy(message), born=message.born + MessageSlot.SUMMED_FROM, died=message.born + MessageSlot.SUMMED
            )
        elif message.role in GATHERED_INTO:
            yield replace(_copy(message), died=message.born + MessageSlot.GATHERED)


def _copy(message: Allocation) -> Allocation:
    return replace(message, role=TensorRole.GLOO_COPY, parameter="")

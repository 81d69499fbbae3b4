"""When memory runs out: told in the words of the plan, or the same step made of smaller micro-batches."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from badam import phases
from badam.errors import OutOfMemory
from badam.plan import Plan
from badam.units import format_bytes

_CPU_REFUSAL = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")
_CUDA_REFUSAL = re.compile(r"Tried to allocate ([\d.]+ [KMG]iB)")


@contextmanager
def explained(plan: Plan) -> Iterator[None]:
    """Turn a refused allocation into an error with phase, size, prediction and what to change.

    Raises:
        OutOfMemory: with exit code 3.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_refusal(error):
            raise
        raise _told(plan, str(error)) from error


def is_refusal(error: RuntimeError) -> bool:
    """Whether an allocator refused; that of the CPU has no class of its own for it."""
    return isinstance(error, torch.OutOfMemoryError) or _CPU_REFUSAL.search(str(error)) is not None


class MicroBatches:
    """How large the micro-batches of a step are: those of the plan are cut into :attr:`parts` of :attr:`rows` rows.

    Args:
        batch_size: rows of a micro-batch in the plan.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.rows = batch_size

    @property
    def parts(self) -> int:
        """Pieces of a full micro-batch."""
        return -(-self.batch_size // self.rows)

    @property
    def can_halve(self) -> bool:
        """Whether a piece has two rows."""
        return self.rows > 1

    def halve(self) -> None:
        """From now on, pieces of half as many rows."""
        self.rows = -(-self.rows // 2)

    def pieces(self, batches: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """``batches`` cut along their rows."""
        return [
            {name: tensor[first : first + self.rows] for name, tensor in batch.items()}
            for batch in batches
            for first in range(0, max(len(tensor) for tensor in batch.values()), self.rows)
        ]


def _told(plan: Plan, message: str) -> OutOfMemory:
    training = plan.training
    predicted = "nothing was predicted"
    if plan.prediction is not None:
        predicted = (
            f"the plan had predicted {format_bytes(plan.prediction.peak_device_bytes)} of "
            f"{format_bytes(plan.target.usable_bytes)}, highest in {plan.prediction.peak_phase}"
        )
    smaller = max(1, training.batch_size // 2)
    change = f"--batch-size {smaller}" if smaller < training.batch_size else f"--seq-len {training.seq_len // 2}"
    if smaller < training.batch_size:
        change += ", or run with --adapt, which makes smaller micro-batches by itself"
    return OutOfMemory(
        f"Out of memory in {phases.current()}, when {_refused_size(message)} more were asked for; {predicted}.",
        advice=f"Plan again with {change}; another process may also hold memory. The last checkpoint is unchanged.",
    )


def _refused_size(message: str) -> str:
    cpu, cuda = _CPU_REFUSAL.search(message), _CUDA_REFUSAL.search(message)
    if cpu is not None:
        return format_bytes(int(cpu.group(1)))
    return cuda.group(1) if cuda is not None else "some bytes"

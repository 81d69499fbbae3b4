"""Smaller micro-batches when memory runs out: the same step in more pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

Batch = Mapping[str, Tensor]


class MicroBatches:
    """The micro-batches of one optimizer step, each to be cut into :attr:`parts` pieces of at most :attr:`rows` rows.

    They are kept until the step is over: gradients that a refused backward left half made must be made again from the
    first one on.

    Args:
        batch_size: rows of a micro-batch in the plan.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.rows = batch_size
        self._batches: list[Batch] = []
        self._begun = 0

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

    def begin_step(self, batches: Sequence[Batch]) -> None:
        """Take the micro-batches of the coming step."""
        self._batches = [dict(batch) for batch in batches]
        self._begun = 0

    def next_batch(self) -> Batch:
        """The step's next micro-batch."""
        self._begun += 1
        return self._batches[self._begun - 1]

    def batches_so_far(self) -> list[Batch]:
        """Those that :meth:`next_batch` gave in this step, the last one included."""
        return self._batches[: self._begun]

    def pieces(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """``batch`` cut along its rows."""
        count = max(len(tensor) for tensor in batch.values())
        for first in range(0, count, self.rows):
            yield {name: tensor[first : first + self.rows] for name, tensor in batch.items()}

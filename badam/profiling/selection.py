"""Which optimizer steps are worth measuring where measuring costs time. Pure."""

from __future__ import annotations


class StepSelection:
    """Picks the steps that can show a higher peak than those before.

    The memory of a step is a function of its block, its place in the visit (the first makes masters and moments, the
    last switches) and the size of its batch. A step is picked if no step of the same block and place had a batch as
    large.
    """

    def __init__(self) -> None:
        self._largest: dict[tuple[int, bool, bool], int] = {}

    def pick(self, block: int, *, first: bool, last: bool, batch_size: int) -> bool:
        """Whether to measure the coming step.

        Args:
            block: the active block.
            first: whether it is the first step of a visit.
            last: whether the block is left after it.
            batch_size: of the largest micro-batch, in tokens with padding.
        """
        key = (block, first, last)
        if batch_size <= self._largest.get(key, -1):
            return False
        self._largest[key] = batch_size
        return True

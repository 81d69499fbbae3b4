"""Which optimizer steps are worth measuring where measuring costs time. Pure."""

from __future__ import annotations


class StepSelection:
    """Picks the steps that can show a higher peak than those before.

    The memory of a step is a function of its block, its place in the visit (the first makes masters and moments, the
    last switches), of the optimizer states that exist before it, and of the size of its batch. A step is picked if no
    step of the same block and place had as many states and as large a batch.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, bool, bool], list[tuple[int, int]]] = {}

    def pick(self, block: int, *, first: bool, last: bool, states: int, batch_size: int) -> bool:
        """Whether to measure the coming step.

        Args:
            block: the active block.
            first: whether it is the first step of a visit.
            last: whether the block is left after it.
            states: how many parameters have optimizer states.
            batch_size: of the largest micro-batch, in tokens with padding.
        """
        seen = self._seen.setdefault((block, first, last), [])
        if any(known >= states and largest >= batch_size for known, largest in seen):
            return False
        seen.append((states, batch_size))
        return True

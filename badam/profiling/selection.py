"""Which optimizer steps are worth measuring where measuring costs time. Pure."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple


class ComingStep(NamedTuple):
    """What decides the memory of a step, but for its batch."""

    block: int  # the active one
    visit_begins: bool  # its optimizer has visits, and this is the first step of one
    visit_ends: bool  # the block is left after it
    states: int  # how many parameters have optimizer states
    active: int  # how many elements are trained; of a step that neither begins nor ends a visit nobody asks


class StepSelection:
    """Picks the steps that can show a higher peak than those before.

    From the second step of a visit on, moments and masters exist while the activations do, and whatever a first step
    makes is there too. So of each block one such step is picked, and another when there are more optimizer states or a
    batch is larger. A first step is picked on the same terms, unless the second is known to be as large: then once per
    size of block. So is a last step, which shows the switch.
    """

    def __init__(self) -> None:
        self._seen: dict[Hashable, list[tuple[int, ...]]] = {}

    def pick(self, step: ComingStep, *, batch_size: int, full_length: bool = False) -> bool:
        """Whether to measure the coming step.

        Args:
            step: what is known of it.
            batch_size: of the largest micro-batch, in tokens with padding.
            full_length: the step and the second one of its visit have batches as large as they get.
        """
        followed = step.visit_begins and not step.visit_ends and full_length
        news = [
            self._is_new("first", step.states, step.active, batch_size)
            if followed
            else self._is_new((step.block, step.visit_begins), step.states, batch_size)
        ]
        if step.visit_ends:
            news.append(self._is_new("last", step.states, step.active))
        return any(news)

    def _is_new(self, kind: Hashable, *sizes: int) -> bool:
        """Whether no step of that kind was as large in every size; if so it is remembered."""
        seen = self._seen.setdefault(kind, [])
        if any(all(had >= size for had, size in zip(known, sizes, strict=True)) for known in seen):
            return False
        seen.append(sizes)
        return True

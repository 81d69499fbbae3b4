"""The position of a run as it is saved, and the check that a saved state belongs to this model and partition."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from badam.blocks.schedule import BlockSchedule
from badam.errors import StateError
from badam.optim.saved_state import read_fields, with_format
from badam.tensors.dtensor import shape_of


@dataclass(frozen=True, slots=True)
class Progress:
    """Position in the schedule, the masters of the visit, and what they belong to."""

    step: int
    visit: int
    steps_in_visit: int
    non_finite_steps: int
    schedule: BlockSchedule
    blocks: list[list[str]]
    active_modules: list[str]
    parameters: int
    model_digest: str
    masters: dict[str, Tensor]
    group_changes: list[list[Any]]

    def pack(self) -> dict[str, Any]:
        """Plain types and tensors, which are not copied; loads with ``weights_only=True``."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return with_format({**fields, "schedule": asdict(self.schedule)})

    @classmethod
    def unpack(cls, saved: dict[str, Any]) -> Progress:
        """What :meth:`pack` gave.

        Raises:
            StateError: if it has another format or lacks something.
        """
        fields = read_fields(saved, cls.__slots__)
        return cls(**{**fields, "schedule": BlockSchedule(**fields["schedule"])})

    def check_against(self, here: Progress) -> None:
        """Refuse a state of another model or partition.

        Raises:
            StateError: with both numbers and the first difference.
        """
        if self.model_digest != here.model_digest:
            raise StateError(
                f"The optimizer state was saved for another model: {self.parameters} parameters there, "
                f"{here.parameters} here, and their names or shapes differ.",
                advice="Load it into the model it was saved with.",
            )
        if (self.blocks, self.active_modules) != (here.blocks, here.active_modules):
            different = len(_common_head(self.blocks, here.blocks))
            raise StateError(
                f"The optimizer state was saved for another partition: {len(self.blocks)} blocks there, "
                f"{len(here.blocks)} here; block {different} is the first that differs.",
                advice="Build the optimizer with the blocks and active modules it was saved with.",
            )


def model_digest(named_parameters: Sequence[tuple[str, nn.Parameter]]) -> str:
    """sha256 of the names and shapes of all parameters."""
    content = [(name, list(shape_of(parameter))) for name, parameter in named_parameters]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _common_head(there: Sequence[Any], here: Sequence[Any]) -> Sequence[Any]:
    """The leading items in which both agree."""
    agreed = []
    for one, other in zip(there, here, strict=False):
        if one != other:
            break
        agreed.append(one)
    return agreed

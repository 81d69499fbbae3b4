"""Optimizers of other libraries that update weights inside backward, with the interface that a trainer expects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


class StepsInBackward(Optimizer):
    """``step`` has nothing left to do."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do nothing: backward has updated the weights."""

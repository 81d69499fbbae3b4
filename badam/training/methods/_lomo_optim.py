"""lomo-optim's Lomo with the interface that a trainer expects."""

from __future__ import annotations

from typing import Any

from lomo_optim.lomo import Lomo
from torch import nn

from badam.training.methods._fused_backward import StepsInBackward


class FusedLomo(StepsInBackward, Lomo):
    """lomo-optim's Lomo; call ``fused_backward(loss, lr)`` in place of backward."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        Lomo.__init__(self, model, **options)

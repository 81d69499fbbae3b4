"""Full-parameter AdamW with fp32 masters: everything is trained all the time."""

from __future__ import annotations

from typing import ClassVar

from torch import nn
from torch.optim import Optimizer

from badam.optim.block import BlockOptimizer
from badam.plan import Plan
from badam.training.methods.blocks import BlockCoordinate, block_optimizer
from badam.vocabulary import Method


class FullAdam(BlockCoordinate):
    """The block optimizer over the one block "all", which is never left, so that its moments last."""

    name: ClassVar[Method] = "adam"

    def build_optimizer(self, model: nn.Module, plan: Plan, *, start_block: int | None = None) -> Optimizer:
        """AdamW over everything."""
        return block_optimizer(BlockOptimizer, model, plan, start_block, switch_block_every=0)

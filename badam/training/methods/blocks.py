"""Block coordinate descent with AdamW inside blocks (BAdam, arXiv 2404.02827)."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from badam.optim.block import BlockOptimizer
from badam.plan import Plan
from badam.training.engines import kind_of
from badam.training.methods.base import TrainingMethod, adamw_options, parameter_groups
from badam.vocabulary import Method

OptimizerT = TypeVar("OptimizerT", bound=BlockOptimizer)


def block_optimizer(
    kind: type[OptimizerT], model: nn.Module, plan: Plan, start_block: int | None, **changes: Any
) -> OptimizerT:
    """A block optimizer of class ``kind`` with AdamW inside, over the plan's blocks; ``changes`` override the plan."""
    base = torch.optim.AdamW(parameter_groups(model, plan.training.optimizer.weight_decay), **adamw_options(plan))
    settings: dict[str, Any] = {
        "block_prefix_list": [list(block.prefixes) for block in plan.partition.blocks],
        "switch_block_every": plan.schedule.switch_every,
        "active_modules": plan.partition.active_modules,
        "start_block": start_block,
        "switch_mode": plan.schedule.switch_mode,
        "verbose": 0,
        "write_back": plan.training.optimizer.write_back,
        "seed": plan.schedule.seed,
        # The rehearsal is alone: the planner adds what averaging takes.
        "average_gradients": kind_of(plan).optimizer_averages and torch.distributed.is_initialized(),
    }
    return kind(base, list(model.named_parameters()), **{**settings, **changes})


class BlockCoordinate(TrainingMethod):
    """One block at a time has gradients, masters and moments."""

    name: ClassVar[Method] = "badam"
    trains_one_block = True

    def build_optimizer(self, model: nn.Module, plan: Plan, *, start_block: int | None = None) -> Optimizer:
        """AdamW inside the plan's blocks."""
        return block_optimizer(BlockOptimizer, model, plan, start_block)

    def state_bytes(self, parameters: int, largest_block: int, blocks: int, *, quantized: int = 0) -> int:
        """2M + 16M/D, for D equal blocks (arXiv 2404.02827, section 2.2)."""
        return 2 * parameters + 16 * parameters // blocks

    def settle(self, optimizer: Optimizer) -> None:
        """The last block is left as every other block was."""
        assert isinstance(optimizer, BlockOptimizer)
        optimizer.write_back_block()

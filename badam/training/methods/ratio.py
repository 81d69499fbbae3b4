"""Block coordinate descent where a block is a share of every parameter (BAdam, arXiv 2404.02827)."""

from __future__ import annotations

from typing import ClassVar

from torch import nn
from torch.optim import Optimizer

from badam.blocks.names import belongs
from badam.optim.ratio import BlockOptimizerRatio
from badam.plan import Plan
from badam.training.methods.base import TrainingMethod, parameter_groups
from badam.vocabulary import Method


class Ratio(TrainingMethod):
    """Windows of every parameter have masters, moments and gradients; the plan's one block says of which parameters."""

    name: ClassVar[Method] = "badam-ratio"

    def build_optimizer(self, model: nn.Module, plan: Plan, *, start_block: int | None = None) -> Optimizer:
        """Windows over the parameters of the plan's block."""
        spec, (block,) = plan.training.optimizer, plan.partition.blocks
        for name, parameter in model.named_parameters():
            if not belongs(name, block.prefixes):
                parameter.requires_grad_(False)
        return BlockOptimizerRatio(
            parameter_groups(model, spec.weight_decay, trained_only=True),
            list(model.named_parameters()),
            update_ratio=plan.training.options.update_ratio,
            verbose=0,
            switch_every=plan.schedule.switch_every,
            lr=spec.learning_rate,
            betas=spec.betas,
            eps=spec.eps,
            include_embedding=True,  # the block's prefixes have decided
            include_lm_head=True,
            fused=spec.fused,
            write_back=spec.write_back,
            seed=plan.schedule.seed,
        )

    def trained_entries(self, model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
        """Entries of all windows, by parameter."""
        assert isinstance(optimizer, BlockOptimizerRatio)
        return {window.name: window.size for window in optimizer.windows}

    def settle(self, optimizer: Optimizer) -> None:
        """The last windows are left as all others were."""
        assert isinstance(optimizer, BlockOptimizerRatio)
        optimizer.write_back_block()

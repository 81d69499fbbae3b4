"""Plain and factored updates fused into backward (LOMO, arXiv 2306.09782; AdaLomo, arXiv 2310.10195)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from badam.blocks.names import belongs
from badam.errors import InputError
from badam.plan import Plan
from badam.training.methods.base import TrainingMethod
from badam.vocabulary import Method


class LowMemory(TrainingMethod):
    """Each gradient is applied and released as soon as the next one appears; there are no masters and no states."""

    name: ClassVar[Method] = "lomo"
    libraries = {"lomo_optim": "lomo-optim"}  # noqa: RUF012 - declared as a class variable by the base
    accumulates = False
    clips = False
    keeps_gradients = False

    def build_optimizer(self, model: nn.Module, plan: Plan, *, start_block: int | None = None) -> Optimizer:
        """lomo-optim's Lomo."""
        from badam.training.methods._lomo_optim import FusedLomo

        _freeze_outside(model, plan)
        spec = plan.training.optimizer
        return FusedLomo(model, lr=spec.learning_rate, weight_decay=spec.weight_decay)

    def backward(self, loss: Tensor, optimizer: Optimizer) -> None:
        """Backward with the update inside, at the learning rate that the schedule has set."""
        fused: Any = optimizer
        fused.fused_backward(loss, optimizer.param_groups[0]["lr"])

    def state_bytes(self, parameters: int, largest_block: int, blocks: int, *, quantized: int = 0) -> int:
        """2M: the weights alone. Not counted: the two gradients that are alive at a time."""
        return 2 * parameters


def _freeze_outside(model: nn.Module, plan: Plan) -> None:
    """Train the plan's one block alone; it holds everything unless somebody has made it smaller."""
    blocks = plan.partition.blocks
    if len(blocks) != 1:
        raise InputError(
            f"The method {plan.method} updates all of its parameters in every backward, and the plan has {len(blocks)} "
            "blocks to take turns.",
            advice=f"Plan again with: badam-plan … --method {plan.method}.",
        )
    for name, parameter in model.named_parameters():
        if not belongs(name, blocks[0].prefixes):
            parameter.requires_grad_(False)


class AdaptiveLowMemory(LowMemory):
    """As LOMO, with second moments kept as one row and one column of fp32 per matrix.

    pytorch-optimizer's implementation: the one of lomo-optim runs on CUDA only.
    """

    name: ClassVar[Method] = "adalomo"
    libraries = {"pytorch_optimizer": "pytorch-optimizer"}  # noqa: RUF012 - declared as a class variable by the base

    def build_optimizer(self, model: nn.Module, plan: Plan, *, start_block: int | None = None) -> Optimizer:
        """pytorch-optimizer's AdaLOMO; losses are scaled for fp16 only."""
        from badam.training.methods._pytorch_optimizer import FusedAdaLomo

        _freeze_outside(model, plan)
        spec = plan.training.optimizer
        narrow = any(parameter.dtype is torch.float16 for parameter in model.parameters())
        return FusedAdaLomo(
            model,
            lr=spec.learning_rate,
            weight_decay=spec.weight_decay,
            loss_scale=2.0**10 if narrow else 0.0,
        )

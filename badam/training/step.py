"""One training step, which the trainer runs, the planner rehearses, and benchmarks and tests time and measure."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from badam import phases
from badam.plan import Plan
from badam.training.engines import Engine
from badam.vocabulary import Phase

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from badam.training.methods.base import TrainingMethod

Batch = dict[str, Tensor]


def train_step(
    plan: Plan,
    method: TrainingMethod,
    model: PreTrainedModel,
    optimizer: Optimizer,
    next_batch: Callable[[], tuple[Batch, Tensor | int]],
    *,
    micro_batches: int,
    engine: Engine | None = None,
    scaler: torch.amp.GradScaler | None = None,
    on_loss: Callable[[Tensor], None] | None = None,
    on_norm: Callable[[Tensor], None] | None = None,
) -> None:
    """One optimizer step: forward, loss and backward of each micro-batch, then clip, update and zero_grad.

    Args:
        plan: the loss, and the bound on the norm of all gradients together (0 leaves them alone).
        method: of the plan; says what loss, backward and so the gradients are.
        model: in training mode, prepared by :func:`badam.training.build.prepare_model`.
        optimizer: of :func:`badam.training.build.build_optimizer`, or what its engine drives it by.
        next_batch: makes the next micro-batch, which the step alone holds and lets go of before its backward (see
            badam.training.losses.forward_loss for what is in it), and tells the number of label tokens, or of labelled
            examples, that its summed loss is divided by: those of all micro-batches of the step.
        micro_batches: how many make the step.
        engine: what several processes do otherwise; one alone by default.
        scaler: of losses in float16, whose gradients would underflow.
        on_loss: called after each backward with the loss of its micro-batch, shape ().
        on_norm: called with the norm of all gradients before they were clipped, shape (), where they are clipped here.
    """
    engine = engine or Engine(plan)
    for number in range(1, micro_batches + 1):
        batch, num_items = next_batch()
        loss = engine.loss(method.loss, model, batch, plan, optimizer, num_items)
        del num_items, batch
        scaled = loss if scaler is None else scaler.scale(loss)
        engine.backward(scaled, method, optimizer, is_last=number == micro_batches)
        if on_loss is not None:
            on_loss(loss)
        del loss, scaled
    if scaler is not None:
        _unscale(scaler, optimizer)
    phases.enter(Phase.STEP)
    engine.clip(model, optimizer, plan.training.optimizer.max_grad_norm, on_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    phases.enter(Phase.SETUP)


def _unscale(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> None:
    """Take the scale out of the step's gradients; drop them if one overflowed, and try a smaller scale then."""
    before = scaler.get_scale()
    scaler.unscale_(optimizer)
    scaler.update()
    if scaler.get_scale() < before and not hasattr(optimizer, "non_finite_steps"):
        optimizer.zero_grad(set_to_none=True)  # ours see for themselves, and count

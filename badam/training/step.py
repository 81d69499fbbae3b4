"""Forward and loss of one micro-batch, which trainer and planner share, and the update as the Trainer makes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from badam import phases
from badam.training.losses import chunked_loss, classification_loss, full_loss, sequence_to_sequence_loss
from badam.vocabulary import Loss, Phase

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def forward_loss(
    model: PreTrainedModel,
    batch: Mapping[str, Tensor],
    loss: Loss,
    *,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Run forward and return the scalar loss; on return the phase is BACKWARD, and the caller's next act.

    Args:
        model: the model, in training mode.
        batch: ``input_ids`` and ``labels``, int64 of shape [batch, length]. Padding is on the right, where the causal
            mask hides it, so no ``attention_mask`` is given: with one, transformers would leave the memory-saving
            attention path. For classification labels have shape [batch], and there is an ``attention_mask``: every
            token of an encoder sees every other. Other tasks have the inputs that badam.training.tasks.blank_batch
            lists; what is no text is in the type of the weights.
        loss: which of the losses to compute, see badam.training.losses.
        num_items: label tokens (or labelled examples) of the whole optimizer step, to divide the summed loss by under
            accumulation.
    """
    phases.enter(Phase.FORWARD)
    if batch["labels"].ndim == 1:
        scalar = classification_loss(model, batch, num_items)
    elif loss == "chunked":
        scalar = chunked_loss(model, batch, num_items)
    elif getattr(model.config, "is_encoder_decoder", False):
        scalar = sequence_to_sequence_loss(model, batch, num_items)
    else:
        scalar = full_loss(model, batch, num_items)
    phases.enter(Phase.BACKWARD)
    return scalar


def update(model: nn.Module, optimizer: Optimizer, max_grad_norm: float) -> None:
    """What follows the last backward of an optimizer step, as transformers' Trainer does it: clip, step, zero_grad.

    Args:
        model: whose gradients are clipped.
        optimizer: takes the step.
        max_grad_norm: bound on the norm of all gradients together; 0 leaves them alone.
    """
    phases.enter(Phase.STEP)
    if max_grad_norm:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    phases.enter(Phase.SETUP)

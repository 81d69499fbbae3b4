"""Forward and loss of one micro-batch: the two losses a plan can name for a language model, and those of other tasks.

``full`` is what transformers' own forward does: logits of every position at once, 10 bytes per token and vocabulary
entry in forward and 12 in backward. ``chunked`` holds the logits of a few positions at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from badam import phases
from badam.errors import InputError
from badam.vocabulary import Loss, Phase

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_BYTES = 256 * 2**20
"""What the chunked loss may hold in logits and their gradients, at 12 bytes per position and vocabulary entry."""

SMALLEST_CHUNK = 64
"""Positions per chunk below which the matrix products would be too thin to be fast."""

IGNORE_INDEX = -100
_UNSUPPORTED = {
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "lm_head_multiplier": (None, 1),
    "output_multiplier": (None, 1),
    "logits_soft_cap": (None,),
    "output_router_logits": (None, False),
}
"""What a configuration may ask for that the chunked loss does not do, each with the values that ask for nothing."""


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
        loss: which of the losses of this module to compute.
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


def full_loss(model: PreTrainedModel, batch: Mapping[str, Tensor], num_items: Tensor | int | None) -> Tensor:
    """The model's own loss, with the logits of all positions.

    Args:
        model: a transformers model that computes its loss from ``labels``.
        batch: the model's inputs with ``labels``.
        num_items: number of label tokens to divide by; None divides by those of this batch.

    Returns:
        A scalar. The logits are released with the model's output on return, before backward begins.
    """
    extra = {} if num_items is None else {"num_items_in_batch": num_items}
    head = model.get_output_embeddings()
    if head is None:
        return cast(Tensor, model(**batch, **extra).loss)
    handle = head.register_forward_pre_hook(lambda *_: phases.enter(Phase.LOSS))
    try:
        return cast(Tensor, model(**batch, **extra).loss)
    finally:
        handle.remove()


def classification_loss(model: PreTrainedModel, batch: Mapping[str, Tensor], num_items: Tensor | int | None) -> Tensor:
    """Cross entropy of a classification, in fp32.

    Args:
        model: returns ``logits`` of shape [batch, classes].
        batch: the model's inputs with ``labels`` [batch].
        num_items: number of examples to divide by; None divides by those of this batch.

    Returns:
        A scalar.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs).logits.float()
    phases.enter(Phase.LOSS)
    total = functional.cross_entropy(logits, batch["labels"], reduction="sum")
    return total / (len(logits) if num_items is None else num_items)


def sequence_to_sequence_loss(
    model: PreTrainedModel, batch: Mapping[str, Tensor], num_items: Tensor | int | None
) -> Tensor:
    """The own loss of a model with an encoder and a decoder: what the decoder is to write comes as ``labels``.

    Such models divide by the label tokens of the batch and know of no others, so under accumulation their mean is
    weighed here.

    Args:
        model: shifts ``labels`` to the right for its decoder.
        batch: the encoder's inputs, and ``labels`` [batch, length], -100 where nothing is to be learned.
        num_items: number of label tokens to divide by; None divides by those of this batch.

    Returns:
        A scalar.
    """
    mean = full_loss(model, batch, None)
    return mean if num_items is None else mean * ((batch["labels"] != IGNORE_INDEX).sum() / num_items)


def check_chunked(model: PreTrainedModel) -> nn.Module:
    """The output projection of a model whose loss can be computed in chunks.

    Raises:
        InputError: if the model does more between its last hidden state and its loss than project, soft-cap and
            compare each position with the next token.
    """
    head = model.get_output_embeddings()
    name = type(model).__name__
    if not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise _cannot_chunk(f"needs a causal language model; {name} is none")
    if head is None or {*model.children()} != {model.base_model, head}:
        raise _cannot_chunk(f"knows one projection after the last layer; {name} has other modules there")
    if "loss_function" not in inspect.unwrap(type(model).forward).__code__.co_names:
        raise _cannot_chunk(f"compares each position with the next token; {name} has a loss of its own")
    config = model.config.get_text_config()
    for attribute, neutral in _UNSUPPORTED.items():
        if getattr(config, attribute, None) not in neutral:
            raise _cannot_chunk(f"leaves out {attribute}, but {name} sets it to {getattr(config, attribute)}")
    return cast(nn.Module, head)


def _cannot_chunk(reason: str) -> InputError:
    return InputError(f"The chunked loss {reason}.", advice="Use --loss full.")


def chunked_loss(model: PreTrainedModel, batch: Mapping[str, Tensor], num_items: Tensor | int | None) -> Tensor:
    """Next-token cross entropy, :func:`chunk_positions` positions of logits at a time.

    Each chunk's logits are computed again in backward, so that neither direction holds those of two chunks.
    Equal to :func:`full_loss` up to the order of summation.

    Raises:
        InputError: see :func:`check_chunked`.
    """
    head = check_chunked(model)
    labels = batch["labels"]
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    hidden = model.base_model(**inputs).last_hidden_state
    phases.enter(Phase.LOSS)
    targets = functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:].reshape(-1)
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    total = hidden.new_zeros((), dtype=torch.float32)
    positions = chunk_positions(model.config.get_text_config().vocab_size)
    chunks = hidden.reshape(-1, hidden.shape[-1]).split(positions)
    for rows, wanted in zip(chunks, targets.split(positions), strict=True):
        total = total + cast(
            Tensor,
            # Shapes are not compared: ZeRO-3 empties a weight as soon as it is not needed, under the eyes of the check.
            checkpoint(
                _chunk_loss,
                head,
                rows,
                wanted,
                softcap,
                use_reentrant=False,
                preserve_rng_state=False,
                determinism_check="none",
            ),
        )
    mean: Tensor = total / ((targets != IGNORE_INDEX).sum() if num_items is None else num_items)
    return mean


def chunk_positions(vocabulary: int) -> int:
    """Positions per chunk, from the vocabulary size."""
    return max(SMALLEST_CHUNK, CHUNK_BYTES // (12 * vocabulary))


def _chunk_loss(head: nn.Module, rows: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """Summed cross entropy of ``rows`` [n, hidden] against ``targets`` [n]."""
    logits = head(rows).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return functional.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")

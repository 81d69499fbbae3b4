"""The loss on data that is not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from badam.plan import Plan
from badam.training.batches import Collator
from badam.training.losses import IGNORE_INDEX, chunked_loss, full_loss

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was found over the whole of the evaluation data."""

    loss: float  # mean cross entropy per label
    labels: int  # tokens, or examples of a classification
    accuracy: float | None = None  # of a classification


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Dataset, collator: Collator, plan: Plan, device: torch.device) -> Evaluation:
    """Evaluate ``model`` in batches of the plan's size, without dropout; nothing of the training changes.

    The sum over all labels divided by their number, whatever the lengths of the batches: a mean of means over batches
    would weigh short examples more.
    """
    was_training, tokens = model.training, collator.tokens
    model.eval()
    collator.full_length = False
    total, labels, right = 0.0, 0, 0
    classifies = plan.model.task == "sequence-classification"
    try:
        for first in range(0, len(dataset), plan.training.batch_size):
            rows = range(first, min(first + plan.training.batch_size, len(dataset)))
            batch = {name: tensor.to(device) for name, tensor in collator([dataset[row] for row in rows]).items()}
            if classifies:
                loss, hits = _classified(model, batch)
                right += hits
                labels += len(batch["labels"])
            else:
                loss = float((chunked_loss if plan.training.loss == "chunked" else full_loss)(model, batch, 1))
                labels += int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
            total += loss
    finally:
        model.train(was_training)
        collator.tokens = tokens
    return Evaluation(total / max(labels, 1), labels, right / max(labels, 1) if classifies else None)


def _classified(model: Any, batch: Mapping[str, Tensor]) -> tuple[float, int]:
    """Summed cross entropy and the number of right answers of one batch."""
    logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits.float()
    loss = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")
    return float(loss), int((logits.argmax(-1) == batch["labels"]).sum())

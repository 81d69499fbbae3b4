"""The loss on data that is not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from badam.plan import Plan
from badam.training.data.batches import Collator
from badam.training.losses import IGNORE_INDEX, chunked_loss, full_loss
from badam.training.processes import Processes

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn


ALONE = Processes()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was found over the whole of the evaluation data."""

    loss: float  # mean cross entropy per label
    labels: int  # tokens, or examples of a classification
    accuracy: float | None = None  # of a classification


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Dataset,
    collator: Collator,
    plan: Plan,
    device: torch.device,
    processes: Processes = ALONE,
) -> Evaluation:
    """Evaluate ``model`` in batches of the plan's size, without dropout; nothing of the training changes.

    ``processes`` take turns at the batches. Each runs equally many, for a sharded model needs all of them in every
    layer: where batches run out the first one is run again, and not counted.

    The sum over all labels divided by their number, whatever the lengths of the batches: a mean of means over batches
    would weigh short examples more.
    """
    was_training, tokens = model.training, collator.tokens
    model.eval()
    collator.full_length = False
    total, labels, right = 0.0, 0.0, 0.0
    classifies = plan.model.task == "sequence-classification"
    try:
        size = plan.training.batch_size
        for turn in range(0, -(-len(dataset) // size), processes.count):
            counts = (turn + processes.rank) * size < len(dataset)
            first = (turn + processes.rank) * size if counts else 0
            rows = range(first, min(first + size, len(dataset)))
            batch = {name: tensor.to(device) for name, tensor in collator([dataset[row] for row in rows]).items()}
            if classifies:
                loss, hits = _classified(model, batch)
                found = len(batch["labels"])
            else:
                loss, hits = _summed_loss(model, batch, plan), 0
                found = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
            if counts:
                total, labels, right = total + loss, labels + found, right + hits
    finally:
        model.train(was_training)
        collator.tokens = tokens
    total, labels, right = processes.sums(total, labels, right)
    return Evaluation(total / max(labels, 1), int(labels), right / max(labels, 1) if classifies else None)


def _summed_loss(model: Any, batch: Mapping[str, Tensor], plan: Plan) -> float:
    """Cross entropy of one batch, summed over its labels."""
    compute = chunked_loss if plan.training.loss == "chunked" else full_loss
    within = getattr(model, "loss_within", None)  # of a sharded model, which gathers the head for it
    return float(compute(model, batch, 1) if within is None else within(lambda: compute(model, batch, 1)))


def _classified(model: Any, batch: Mapping[str, Tensor]) -> tuple[float, int]:
    """Summed cross entropy and the number of right answers of one batch."""
    logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits.float()
    loss = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")
    return float(loss), int((logits.argmax(-1) == batch["labels"]).sum())

"""The steps themselves: what badam-train does to the device, in a bare loop over random tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from badam import phases, profiling
from badam.plan import Plan
from badam.profiling.record import MeasuredRun
from badam.training.build import build_model
from badam.training.methods import method_of
from badam.training.step import train_step
from badam.vocabulary import Phase

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from badam.training.engines import Engine

SEED = 0


def build_on(device: torch.device, plan: Plan) -> PreTrainedModel:
    """The plan's model with random weights, made where it will train and in its final type.

    What making it left in the allocator's cache is given back, as badam-train finds it after loading.
    """
    torch.manual_seed(SEED)
    with device:
        model = build_model(plan.model, plan.training)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return model


def run_steps(
    plan: Plan,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    command: str,
    engine: Engine | None = None,
) -> MeasuredRun:
    """Train for ``steps`` optimizer steps and tell what was measured.

    Args:
        plan: what to train.
        model: prepared for it.
        optimizer: of the plan.
        steps: how many.
        command: written into the record.
        engine: of one of several processes, each with a GPU, which drives the optimizer.

    Raises:
        torch.OutOfMemoryError, RuntimeError: if the device refuses an allocation.
    """
    # What an engine partitions may be on the host between its uses.
    device = next(model.parameters()).device if engine is None else torch.device("cuda", torch.cuda.current_device())
    driven = optimizer if engine is None else engine.drive(model, optimizer)
    phases.enter(Phase.SETUP)
    with profiling.record(optimizer, model, plan=plan) as run:
        for _ in range(steps):
            loss = optimizer_step(plan, model, driven, device, engine)
            run.note(loss=float(loss), tokens=_tokens(plan))
            del loss
    measured = run.measured_run()
    provenance = measured.provenance.model_copy(update={"command": command})
    return measured.model_copy(update={"provenance": provenance})


def optimizer_step(
    plan: Plan,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    engine: Engine | None = None,
) -> Tensor:
    """One optimizer step on random tokens; returns the loss, shape (), detached."""
    total, items = torch.zeros((), device=device), torch.tensor(_tokens(plan), device=device)
    train_step(
        plan,
        method_of(plan.method),
        model,
        optimizer,
        lambda: (random_batch(plan, model, device), items),
        micro_batches=plan.training.grad_accum,
        engine=engine,
        on_loss=lambda loss: total.add_(loss.detach()),
    )
    return total


def random_batch(plan: Plan, model: PreTrainedModel, device: torch.device) -> dict[str, Tensor]:
    """``input_ids`` and ``labels``, int64 of shape [batch, length], of the plan's full size."""
    shape = (plan.training.batch_size, plan.training.seq_len)
    vocabulary = int(model.config.get_text_config().vocab_size)
    tokens = torch.randint(0, vocabulary, shape, device=device)
    return {"input_ids": tokens, "labels": tokens.clone()}


def _tokens(plan: Plan) -> int:
    return plan.training.batch_size * plan.training.seq_len * plan.training.grad_accum

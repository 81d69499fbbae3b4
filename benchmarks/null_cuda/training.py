"""Trains a plan on the null device, with every request to the allocator recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from badam.plan import Plan
from badam.profiling.record import MeasuredRun
from badam.training.build import build_model, build_optimizer, prepare_checkpointing, prepare_model
from badam.training.engines import engine_of
from benchmarks.gpu.loop import build_on, run_steps
from benchmarks.null_cuda.history import Request, recorded
from benchmarks.null_cuda.ranks import join

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def train(plan: Plan, steps: int, *, command: str) -> tuple[MeasuredRun, list[Request]]:
    """Train for ``steps`` optimizer steps; returns what was measured and what the allocator was asked.

    Raises:
        torch.OutOfMemoryError: if the device refuses an allocation.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.init()
    at: list[tuple[torch.optim.Optimizer, list[int]]] = []

    def position() -> tuple[int, str]:
        if not at:
            return -1, ""
        optimizer, ended = at[0]
        blocks = plan.partition.blocks
        index = getattr(optimizer, "current_block_idx", 0)
        return ended[0], blocks[index].name if index < len(blocks) else ""

    if plan.target.num_gpus > 1:
        join(plan.target.num_gpus)
    engine = engine_of(plan) if plan.target.num_gpus > 1 else None
    with recorded(position) as requests:
        model = model_on(device, plan) if engine is None else engine.build()
        if engine is None:
            prepare_model(model, plan)
            model.to(device)
        else:
            engine.place(model)
            prepare_model(model, plan)
            torch.cuda.empty_cache()
        optimizer = build_optimizer(model, plan)
        prepare_checkpointing(model, optimizer, plan)
        count = [0]
        at.append((optimizer, count))

        def ended(*_: object) -> None:
            count[0] += 1

        optimizer.register_step_post_hook(ended)
        run = run_steps(plan, model, optimizer, steps, command=command, engine=engine)
    return run, requests


def model_on(device: torch.device, plan: Plan) -> PreTrainedModel:
    """The plan's model with random weights; one that is to be quantized is built on the host, as when it is loaded."""
    if plan.method == "qlora":
        with torch.device("meta"):
            model = build_model(plan.model, plan.training)
        model.to_empty(device="cpu")
        model.tie_weights()
        return model
    return build_on(device, plan)

"""One visit of a plan on real tensors, measured by the CPU allocator's own reports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from packaging.version import Version

from badam import phases
from badam.plan import Plan, Schedule
from badam.profiling.memory.cpu import CpuMemory
from badam.profiling.memory.states import ModelStates
from badam.training.build import build_model, build_optimizer, prepare_checkpointing, prepare_model
from badam.training.methods import method_of
from badam.training.step import train_step
from badam.training.tasks import blank_batch
from badam.vocabulary import Category
from badam_planner.rehearsal.rehearse import VISIT_STEPS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

products_take_known_scratch = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"), reason="matrix products of an older torch take other scratch on a CPU"
)


@dataclass(frozen=True)
class Measured:
    """Bytes at the highest step, and what each step's loss was."""

    peak_bytes: int
    by_category: dict[Category, int]
    losses: list[float]


def measure(
    plan: Plan, block: int = 0, *, steps: int = VISIT_STEPS, visit_steps: int = VISIT_STEPS, same_data: bool = False
) -> Measured:
    """Train ``steps`` steps of ``plan``, from ``block`` on, in visits of ``visit_steps``, as the trainer does."""
    torch.manual_seed(0)
    method = method_of(plan.method)
    memory = CpuMemory()
    memory.start()
    before = memory.live_bytes  # what libraries and the test runner hold
    model = build_model(plan.model, plan.training)
    prepare_model(model, plan)
    visit = plan.model_copy(update={"schedule": Schedule(switch_mode="ascending", switch_every=visit_steps)})
    optimizer = build_optimizer(model, visit, start_block=block)
    prepare_checkpointing(model, optimizer, visit)
    memory.attach(ModelStates(model, optimizer))
    items = plan.training.batch_size * plan.training.seq_len
    found, losses = [], []
    with phases.listening(lambda _previous, phase: memory.phase_begins(phase)):
        for _ in range(steps):
            seeds, micro_losses = iter(range(plan.training.grad_accum)), list[float]()

            def next_batch(seeds: Iterator[int] = seeds) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
                seed = next(seeds)
                if same_data:
                    torch.manual_seed(seed)
                return _random_batch(plan, model.config), torch.tensor(items)

            train_step(
                plan,
                method,
                model,
                optimizer,
                next_batch,
                micro_batches=plan.training.grad_accum,
                on_loss=lambda loss, losses=micro_losses: losses.append(loss.item()),
            )
            losses.append(sum(micro_losses))
            found.append(memory.end_step(pause=False))
    memory.stop()
    highest = max(found, key=lambda step: step.peak_bytes)
    return Measured(highest.peak_bytes - before, highest.by_category, losses)


def _random_batch(plan: Plan, config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """The plan's batch with tokens below 96 and any images and sounds, padded where there is a mask to say so."""
    batch = blank_batch(plan, config)
    for name, tensor in batch.items():
        if name == "attention_mask":
            tensor[0, -1] = 0
        elif tensor.is_floating_point():
            tensor.normal_()
        elif name == "input_ids" or (name == "labels" and tensor.ndim > 1):
            tensor.random_(0, 96)
    return batch

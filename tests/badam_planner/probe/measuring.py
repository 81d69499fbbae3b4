"""One visit of a plan on real tensors, measured by the CPU allocator's own reports."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from badam import phases
from badam.plan import Plan, Schedule
from badam.profiling.cpu_memory import CpuMemory
from badam.profiling.states import ModelStates
from badam.training.assemble import build_model, build_optimizer, prepare_checkpointing, prepare_model
from badam.training.methods import method_of
from badam.training.step import update
from badam.vocabulary import Category
from badam_planner.probe.rehearse import VISIT_STEPS


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
    shape = (plan.training.batch_size, plan.training.seq_len)
    found, losses = [], []
    with phases.listening(lambda _previous, phase: memory.phase_begins(phase)):
        for _ in range(steps):
            total = 0.0
            for micro in range(plan.training.grad_accum):
                if same_data:
                    torch.manual_seed(micro)
                batch = {"input_ids": torch.randint(0, 96, shape), "labels": torch.randint(0, 96, shape)}
                if plan.model.task == "sequence-classification":
                    batch["attention_mask"] = torch.ones(shape, dtype=torch.int64)
                    batch["attention_mask"][0, -1] = 0  # padded, as the plan assumes
                    batch["labels"] = torch.zeros(shape[0], dtype=torch.int64)
                loss = method.loss(model, batch, plan, optimizer, torch.tensor(shape[0] * shape[1]))
                del batch
                method.backward(loss, optimizer)
                total += loss.item()
                del loss
            losses.append(total)
            update(model, optimizer, plan.training.optimizer.max_grad_norm)
            found.append(memory.end_step(pause=False))
    memory.stop()
    highest = max(found, key=lambda step: step.peak_bytes)
    return Measured(highest.peak_bytes - before, highest.by_category, losses)

"""Run draws under a limit of memory: torch's own where there is a card, a comparison afterwards where there is none."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from badam import phases
from badam.errors import BadamError, OutOfMemory
from badam.plan import Plan, Target
from badam.profiling.memory.states import live_cpu_tensors
from badam.training.memory_limit import explained
from badam.vocabulary import Phase
from badam_planner.rehearsal.evaluator import Evaluator
from benchmarks.gpu.draws import Draw, Outcome
from benchmarks.gpu.loop import build_on, run_steps
from benchmarks.gpu.optimizers import case_optimizer
from benchmarks.gpu.plans import case_plan

LEFTOVER_SHARE = 0.001
"""Of its limit, what a draw may leave allocated. More, and the next one would start from less than it is promised."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A draw with what the planner says of it, before it runs."""

    plan: Plan
    outcome: Outcome


def prepare(draw: Draw, target: Target, command: str) -> Prepared:
    """Predict a draw. Its plan visits two blocks: the one with the highest peak and the last other one.

    Raises:
        InputError: if the model cannot be cut or rehearsed as drawn.
    """
    plan, tree, _ = case_plan(draw.case, target, command)
    evaluator = Evaluator(tree)
    known = evaluator.worst_block(plan)
    blocks = plan.partition.blocks
    others = [index for index in range(len(blocks)) if index != known.worst_block]
    chosen = tuple(blocks[index] for index in (known.worst_block, *others[-1:]))
    worst = known.worst
    predicted = worst.peak_allocated_bytes if target.gpu == "cpu" else worst.peak_reserved_bytes
    limit = round(predicted * draw.fraction)
    within = plan.model_copy(
        update={"target": target.model_copy(update={"usable_bytes": limit + target.outside_bytes})}
    )
    return Prepared(
        plan.model_copy(update={"partition": plan.partition.model_copy(update={"blocks": chosen})}),
        Outcome(
            draw=draw,
            blocks=tuple(block.name for block in chosen),
            predicted_allocated_bytes=worst.peak_allocated_bytes,
            predicted_bytes=predicted,
            limit_bytes=limit,
            predicted_releases_per_step=evaluator.cache_releases(within, known),
            ran=None,
        ),
    )


def run_all(prepared: Sequence[Prepared], device: torch.device, command: str) -> Iterator[Outcome]:
    """Run draws one after the other, each within its limit, and say what became of them.

    Raises:
        BadamError: after a draw that failed or left memory allocated; the ones after it belong in another process.
    """
    _warm_up(device)
    for each in prepared:
        phases.enter(Phase.SETUP)
        before = _allocated(device)
        outcome = _run(each, device, command)
        yield outcome
        if outcome.ran is None:
            raise BadamError(f"Draw {each.outcome.draw.index} failed: {outcome.message}")
        left = _allocated(device) - before
        if left > LEFTOVER_SHARE * each.outcome.limit_bytes:
            raise BadamError(f"Draw {each.outcome.draw.index} left {left} bytes allocated.")


def _run(prepared: Prepared, device: torch.device, command: str) -> Outcome:
    outcome, plan = prepared.outcome, prepared.plan
    begun = time.monotonic()
    _limit(device, outcome.limit_bytes)
    try:
        with explained(plan):
            measured = _steps(prepared, device, command)
    except OutOfMemory as error:
        refused = {"ran": False, "message": error.message}
        return outcome.model_copy(update={**refused, "seconds": time.monotonic() - begun})
    except Exception as error:  # what it was stands in the record, and the draws after it run in another process
        return outcome.model_copy(update={"message": f"{type(error).__name__}: {error}"})
    finally:
        _limit(device, None)
    allocated, reserved = measured
    used = allocated if reserved is None else reserved
    return outcome.model_copy(
        update={
            "ran": used <= outcome.limit_bytes,
            "measured_allocated_bytes": allocated,
            "measured_bytes": used,
            "seconds": time.monotonic() - begun,
        }
    )


def _steps(prepared: Prepared, device: torch.device, command: str) -> tuple[int, int | None]:
    """Visit the plan's blocks once; returns the peaks, allocated and reserved."""
    plan, case = prepared.plan, prepared.outcome.draw.case
    model = build_on(device, plan)
    optimizer = case_optimizer(case, plan, model, None)
    steps = len(plan.partition.blocks) * case.switch_every
    measurement = run_steps(plan, model, optimizer, steps, command=command).measurement
    return measurement.peak_allocated_bytes, measurement.peak_reserved_bytes


def _limit(device: torch.device, limit: int | None) -> None:
    """Let torch's allocator have ``limit`` bytes, or all there are."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if limit is None else min(limit / total, 1.0), device)


def _warm_up(device: torch.device) -> None:
    """Let libraries allocate what they keep for the life of the process, in forward's thread and in backward's."""
    weight = torch.zeros(256, 256, dtype=torch.bfloat16, device=device, requires_grad=True)
    (weight @ weight).sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _allocated(device: torch.device) -> int:
    """Allocated bytes once everything is released that is not in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return int(torch.cuda.memory_allocated(device))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in live_cpu_tensors()}
    return sum(storages.values())

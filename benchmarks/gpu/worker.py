"""What runs in the process of one case; driven by ``measure``. Loads torch only inside its functions."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from badam.errors import BadamError, OutOfMemory
from badam.plan import Plan, Target, save_record
from benchmarks.gpu.cases import Case
from benchmarks.gpu.pool import GO, READY
from benchmarks.gpu.record import CaseRecord, record_path

if TYPE_CHECKING:
    import torch

PRELOAD = (
    "badam_planner.search.planner",
    "badam_planner.rehearsal.evaluator",
    "badam_planner.rehearsal.rehearse",
    "badam.profiling.recorder",
    "benchmarks.gpu.assumptions",
    "benchmarks.gpu.loop",
    "benchmarks.gpu.optimizers",
    "benchmarks.gpu.plans",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
)
"""What every case's process needs, and none of which touches a device when it is loaded."""

PROBE = "probe"

Turn = Callable[[], None]
"""Called when everything is ready that needs no device; returns when the device is free."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a process is to do. Without a case: to measure what the predictor assumes of the card."""

    case: Case | None
    device: str  # "cuda" or "cpu"
    out: Path
    command: str
    old_badam: Path | None = None


def main(job: Job, pipe: Connection) -> None:
    """Run one job in this process and leave its record behind."""
    name = "assumptions" if job.case is None else job.case.name
    redirect_output(log_path(job.out, name))

    prepare_process()
    if job.case is None:
        await_turn(pipe)
        from benchmarks.gpu.assumptions import measure_assumptions

        save_record(measure_assumptions(job.command), record_path(job.out, name))
    else:
        save_record(run_case(job.case, job, lambda: await_turn(pipe)), record_path(job.out, name))
    with suppress(OSError):
        log_path(job.out, name).unlink()


def probe(job: Job, pipe: Connection) -> None:
    """Touch the device: ends with an error where a process made this way cannot."""
    redirect_output(log_path(job.out, PROBE))
    import torch

    await_turn(pipe)
    torch.ones(1, device=job.device).add_(1)
    log_path(job.out, PROBE).unlink(missing_ok=True)


def prepare_environment() -> None:
    """Settings that processes inherit."""
    # A process that loads libraries for others must not touch the card, or they could not use it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def await_turn(pipe: Connection) -> None:
    """Say that everything is ready that needs no device, and wait for it. Ends the process if there is no parent."""
    try:
        pipe.send(READY)
        go = pipe.recv() == GO
    except (EOFError, OSError):
        go = False
    if not go:
        raise SystemExit(1)


def prepare_process() -> None:
    """Settings of a process that measures."""
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def run_case(case: Case, job: Job, turn: Turn) -> CaseRecord:
    """Predict, wait for the device, measure. Whatever goes wrong is in the record."""
    from badam.profiling.machine import provenance, this_machine

    seconds: dict[str, float] = {}
    found: dict[str, Any] = {}
    try:
        begun = time.monotonic()
        plan = found["plan"] = _predicted_plan(case, job)
        seconds["predict"] = time.monotonic() - begun
        turn()
        found.update(_measured(case, plan, job, seconds))
        outcome, message = "measured", ""
    except OutOfMemory as error:
        outcome, message = "out of memory", str(error)
        found["peak_before_refusal_bytes"] = _peak(job.device)
    except Exception as error:  # the next case must run, and the record must say what happened to this one
        outcome, message = "failed", str(error) if isinstance(error, BadamError) else _told(error)
    return CaseRecord.model_validate(
        {
            "case": case,
            "outcome": outcome,
            "message": message,
            "seconds": seconds,
            "machine": this_machine(current_device(job.device)),
            "provenance": provenance(job.command),
            **found,
        }
    )


def target_of(device: str) -> Target:
    """The device as the target of a plan: the card in this machine, or its main memory."""
    from badam_planner.sources.target import find_target

    return find_target("auto" if device == "cuda" else "cpu")


def _predicted_plan(case: Case, job: Job) -> Plan:
    from benchmarks.gpu.plans import case_plan, predicted, with_formula

    plan, tree, blocks = case_plan(case, target_of(job.device), job.command)
    return with_formula(predicted(plan, tree), blocks)


def _measured(case: Case, plan: Plan, job: Job, seconds: dict[str, float]) -> dict[str, Any]:
    from badam.training.memory_limit import explained
    from benchmarks.gpu.loop import build_on, run_steps
    from benchmarks.gpu.optimizers import case_optimizer

    device = current_device(job.device)
    begun = time.monotonic()
    with explained(plan):
        model = build_on(device, plan)
        seconds["build"] = time.monotonic() - begun
        optimizer = case_optimizer(case, plan, model, job.old_badam)
        begun = time.monotonic()
        run = run_steps(plan, model, optimizer, case.steps(len(plan.partition.blocks)), command=job.command)
        seconds["train"] = time.monotonic() - begun
    found: dict[str, Any] = {"run": run}
    if device.type == "cuda":
        from benchmarks.gpu.meter import CudaMeter, account

        found["account"] = account(CudaMeter())
    return found


def current_device(name: str) -> torch.device:
    """The device called ``cuda`` or ``cpu``."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device("cpu")


def _peak(device: str) -> int | None:
    """Highest allocated bytes since the last phase began."""
    import torch

    return int(torch.cuda.max_memory_allocated()) if device == "cuda" else None


def _told(error: Exception) -> str:
    return "".join(traceback.format_exception(error)[-8:]).strip()


def log_path(out: Path, name: str) -> Path:
    """Where a process writes what it prints; removed when it has left a record."""
    return out / f".{name}.log"


def redirect_output(path: Path) -> None:
    """Send standard output and error of this process, also of its libraries, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)

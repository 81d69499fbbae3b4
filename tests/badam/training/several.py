"""Runs of badam-train's own function in processes that know each other; starting them takes longer than the runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from badam.errors import BadamError
from badam.plan import Plan
from badam.training.interruption import Interruption
from badam.training.options import RunOptions
from badam.training.processes import Processes
from badam.training.run import run_plan


def run_all(plan: str, runs: dict[str, dict[str, Any]]) -> dict[str, str]:
    """One run after another of the same plan; what each one's error said, or nothing.

    Of a run's settings ``from`` is a directory to copy and resume in, of which only one checkpoint is left, ``stop``
    the step after which process 1 gets a signal; ``plan`` are changes of the plan.
    """
    errors = {}
    for name, settings in runs.items():
        source, stop = settings.pop("from", None), settings.pop("stop", None)
        changes = settings.pop("plan", {})
        options = RunOptions(**settings)
        if source is not None and dist.get_rank() == 0:
            leave_only(source, options.output_dir)
        dist.barrier()
        usual = Interruption.spread
        if stop is not None:
            Interruption.spread = signalled_at(stop)  # type: ignore[method-assign]
        try:
            run_plan(Plan.model_validate({**json.loads(plan), **changes}), options, Console(quiet=True), command="test")
        except BadamError as error:
            errors[name] = str(error)
        except SystemExit as end:
            errors[name] = f"ended with {end.code}"
        finally:
            Interruption.spread = usual  # type: ignore[method-assign]
    return errors


def leave_only(source: tuple[str, str], target: Path) -> None:
    """``target`` as the run in a directory was when it had just written a checkpoint, given by both their names."""
    directory, checkpoint = source
    shutil.copytree(Path(directory) / checkpoint, target / checkpoint)


def signalled_at(step: int) -> Any:
    """``Interruption.spread`` where process 1 has just got SIGTERM in a step."""
    usual, steps = Interruption.spread, []

    def spread(interruption: Interruption, processes: Processes) -> None:
        steps.append(1)
        if len(steps) == step and processes.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        usual(interruption, processes)

    return spread

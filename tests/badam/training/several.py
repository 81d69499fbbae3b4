"""Runs of badam-train's own function in processes that know each other; starting them takes longer than the runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from badam.errors import BadamError
from badam.plan import Plan
from badam.training.interruption import Interruption
from badam.training.options import RunOptions
from badam.training.processes import Processes
from badam.training.run import run_plan
from badam.training.trainer import PlanTrainer


def run_all(plan: str, runs: dict[str, dict[str, Any]]) -> dict[str, str]:
    """One run after another of the same plan; what each one's error said, or nothing.

    Of a run's settings ``from`` is a directory to copy and resume in, of which only one checkpoint is left, ``stop``
    the step after which process 1 gets a signal, ``full`` whether its disk is, or that of the ``first`` process for its
    second checkpoint under ZeRO-3; ``plan`` are changes of the plan.
    """
    errors = {}
    for name, settings in runs.items():
        source, stop = settings.pop("from", None), settings.pop("stop", None)
        changes, full = settings.pop("plan", {}), settings.pop("full", False)
        options = RunOptions(**settings)
        if source is not None and dist.get_rank() == 0:
            leave_only(source, options.output_dir)
        dist.barrier()
        usual, writes, saves = Interruption.spread, FileSystemWriter.write_data, torch.save
        if full == "first" and dist.get_rank() == 0:
            torch.save = full_at_second(torch.save)
        elif full and dist.get_rank() == 1:
            FileSystemWriter.write_data = no_space  # type: ignore[method-assign]
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
            FileSystemWriter.write_data = writes  # type: ignore[method-assign]
            torch.save = saves
    return errors


def fail_alone(plan: str, settings: dict[str, Any]) -> None:
    """A run in which the disk is full for what the first process alone writes of a checkpoint."""
    if dist.get_rank() == 0:
        PlanTrainer.save_model = no_space  # type: ignore[method-assign]
    run_plan(Plan.model_validate_json(plan), RunOptions(**settings), Console(quiet=True), command="test")


def no_space(*_: Any, **__: Any) -> Any:
    """What writing to a full disk does."""
    raise OSError(28, "No space left on device")


def full_at_second(usual: Any) -> Any:
    """``torch.save`` to a disk that is full in the middle of the second file with all of a model's state."""
    files: list[Path] = []

    def save(value: Any, file: Any, *rest: Any, **options: Any) -> None:
        if "state.pt" in str(file):
            files.append(Path(file))
            if len(files) == 2:
                files[1].write_bytes(b"the beginning")
                no_space()
        usual(value, file, *rest, **options)

    return save


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

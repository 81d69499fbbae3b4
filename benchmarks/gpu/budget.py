"""Random configurations close to a pretended limit: how often does the planner say that something fits that does not?

    python -m benchmarks.gpu.budget --out benchmarks/records/gpu/h200/budget --cases 200 --minutes 8
    python -m benchmarks.gpu.budget --out /tmp/budget --cases 6 --device cpu --models tiny.json

Each draw's limit lies within 5 % of what is predicted for it, above or below, and torch's allocator keeps to it. Goes
on where an earlier call stopped. Loads no torch.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from badam.errors import BadamError, InputError
from badam.plan import save_record
from benchmarks.gpu.draws import MODELS, BudgetRecord, Draw, Outcome, counts, draw, outcomes_in, summary
from benchmarks.gpu.measure import start_method
from benchmarks.gpu.pool import Limits, Pool, StartMethod, ahead_of_device
from benchmarks.gpu.worker import (
    PRELOAD,
    await_turn,
    current_device,
    log_path,
    prepare_environment,
    prepare_process,
    redirect_output,
    target_of,
)

GROUP = 10
"""Draws of one process: they share the time that a process needs to open the device."""


@dataclass(frozen=True, slots=True)
class Job:
    """The draws that a process is to run, and where their outcomes belong."""

    draws: tuple[Draw, ...]
    path: Path
    device: str
    command: str


def run_group(job: Job, pipe: Connection) -> None:
    """Predict, wait for the device, run; the record is written anew after each draw, so that none is lost."""
    redirect_output(log_path(job.path.parent, job.path.stem))
    prepare_process()
    from badam.profiling.machine import provenance, this_machine
    from benchmarks.gpu.limits import prepare, run_all

    target = target_of(job.device)
    known = outcomes_in([job.path])
    done = {outcome.draw for outcome in known}
    prepared = [prepare(one, target, job.command) for one in job.draws if one not in done]
    await_turn(pipe)
    device = current_device(job.device)
    record = BudgetRecord(outcomes=known, machine=this_machine(device), provenance=provenance(job.command))
    try:
        for outcome in run_all(prepared, device, job.command):
            record = record.model_copy(update={"outcomes": (*record.outcomes, outcome)})
            save_record(record, job.path)
    except BadamError as error:
        save_record(record.model_copy(update={"message": str(error)}), job.path)
    log_path(job.path.parent, job.path.stem).unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if no fit was wrong, 1 if one was or draws are left, 2 for bad input."""
    options = _parser().parse_args(arguments)
    command = shlex.join(["python", "-m", "benchmarks.gpu.budget", *(arguments or sys.argv[1:])])
    try:
        return _budget(options, command)
    except BadamError as error:
        print(f"error: {error}", flush=True)
        return error.exit_code


def _budget(options: argparse.Namespace, command: str) -> int:
    out: Path = options.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Cannot make the directory {out}: {error.strerror or error}.") from error
    models = MODELS if options.models is None else tuple((name, options.parameters) for name in options.models)
    draws = [draw(index, seed=options.seed, models=models, group=GROUP) for index in range(options.cases)]
    groups = [tuple(draws[start : start + GROUP]) for start in range(0, len(draws), GROUP)]
    jobs = {
        f"draws {group[0].index}-{group[-1].index}": Job(
            group, out / f"budget-{group[0].index:04d}.json", options.device, command
        )
        for group in groups
    }
    prepare_environment()
    _run_until_done(jobs, options, start_method(options.device, out))
    outcomes = [outcome for job in jobs.values() for outcome in _outcomes(job)]
    print(summary(outcomes, len(draws)), flush=True)
    wrong = any(outcome.verdict == "wrong fit" for outcome in outcomes)
    return 1 if wrong or len(outcomes) < len(draws) else 0


def _run_until_done(jobs: dict[str, Job], options: argparse.Namespace, start: StartMethod) -> None:
    """Run the groups, and those that a process did not finish again, until all are done or nothing more is."""
    deadline = time.monotonic() + 60 * options.minutes

    def ended(name: str, code: int, seconds: float) -> None:
        outcomes = _outcomes(jobs[name])
        print(f"{name}: {len(outcomes)} run, {counts(outcomes)}, {seconds:.0f} s", flush=True)
        if code:
            _warn_of(jobs[name], code)

    while True:
        remaining = deadline - time.monotonic()
        todo = {name: job for name, job in jobs.items() if len(_outcomes(job)) < len(job.draws)}
        before = sum(len(_outcomes(job)) for job in jobs.values())
        if not todo or remaining <= 0:
            return
        limits = Limits(
            seconds=remaining,
            seconds_per_job=60 * options.group_minutes,
            ahead=ahead_of_device(options.device),
        )
        Pool(run_group, limits, ended, start=start, preload=(*PRELOAD, "benchmarks.gpu.limits")).run(todo.items())
        if sum(len(_outcomes(job)) for job in jobs.values()) == before:
            return


def _outcomes(job: Job) -> tuple[Outcome, ...]:
    """The outcomes of this very job's draws, which another seed or another list of models would not have made."""
    return tuple(outcome for outcome in outcomes_in([job.path]) if outcome.draw in job.draws)


def _warn_of(job: Job, code: int) -> None:
    log = log_path(job.path.parent, job.path.stem)
    text = log.read_text(encoding="utf-8", errors="replace").strip() if log.exists() else ""
    print(f"  its process ended with code {code}: {text[-600:]}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.budget", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the records")
    parser.add_argument("--cases", type=int, default=200, help="draws")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--group-minutes", type=float, default=3.0, help="of one group of draws on the device")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="instead of the built-in list")
    parser.add_argument("--parameters", type=int, default=10**11, help="of the models given: bounds tokens per step")
    return parser


if __name__ == "__main__":
    sys.exit(main())

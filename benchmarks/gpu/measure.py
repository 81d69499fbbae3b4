"""Measure the cases of the table on this machine, one record per case; goes on where an earlier call stopped.

    python -m benchmarks.gpu.measure --out benchmarks/records/gpu/h200 --minutes 8
    python -m benchmarks.gpu.measure --out /tmp/records --device cpu --cases tiny.json

Each case runs in a process of its own. Loads no torch.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from badam.errors import BadamError, InputError
from badam.plan import save_record
from badam.units import format_bytes
from badam_planner.accuracy.comparison import Pair
from badam_planner.report.text import error_in_words
from benchmarks.gpu.cases import CASES, Case, load_cases, select
from benchmarks.gpu.pool import Limits, Pool, StartMethod, ahead_of_device
from benchmarks.gpu.record import (
    ASSUMPTIONS,
    CaseRecord,
    is_done,
    load_assumptions,
    load_case,
    plain_provenance,
    record_path,
)
from benchmarks.gpu.worker import PRELOAD, PROBE, Job, log_path, prepare_environment, probe
from benchmarks.gpu.worker import main as run_job


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if every case asked for has a result, 1 if some failed or time ran out, 2 for bad input."""
    options = _parser().parse_args(arguments)
    options.command = shlex.join(["python", "-m", "benchmarks.gpu.measure", *(arguments or sys.argv[1:])])
    try:
        cases = select(CASES if options.cases is None else load_cases(options.cases), options.only)
        if options.list:
            print("\n".join(case.name for case in cases))
            return 0
        return _measure(cases, options)
    except BadamError as error:
        _say(f"error: {error}")
        return error.exit_code


def _measure(cases: Sequence[Case], options: argparse.Namespace) -> int:
    begun = time.monotonic()
    out: Path = options.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Cannot make the directory {out}: {error.strerror or error}.") from error
    command: str = options.command
    wanted = _without_old(cases, options.old_badam)
    todo = [case for case in wanted if not is_done(record_path(out, case.name), case)]
    # What failed before comes last: it may fail again, and what was never tried tells more.
    todo.sort(key=lambda case: record_path(out, case.name).exists())
    _say(f"{len(wanted)} cases, {len(wanted) - len(todo)} of them measured already")
    limits = Limits(
        seconds=60 * options.minutes,
        seconds_per_job=60 * options.case_minutes,
        ahead=ahead_of_device(options.device) if options.ahead is None else options.ahead,
    )
    prepare_environment()
    by_name = {case.name: case for case in todo}
    failed: list[str] = []

    def ended(name: str, code: int, seconds: float) -> None:
        if name == ASSUMPTIONS:
            ok = _has_assumptions(out)
            _say(f"{name}: {'measured' if ok else _last_words(out, name, code)}, {seconds:.0f} s")
        else:
            ok = _report(out, by_name[name], code, seconds, limits, command)
        if not ok:
            failed.append(name)

    pool = Pool(run_job, limits, ended, start=start_method(options.device, out), preload=PRELOAD)
    if options.device == "cuda" and not _has_assumptions(out):
        pool.run([(ASSUMPTIONS, Job(None, options.device, out, command))])  # alone: it asks what a first process finds
    pool.limits = replace(limits, seconds=limits.seconds - (time.monotonic() - begun))
    left = pool.run((case.name, Job(case, options.device, out, command, options.old_badam)) for case in todo)
    for name in left:
        log_path(out, name).unlink(missing_ok=True)
    if left:
        _say(f"{len(left)} left for the next call, {left[0]} first")
    return 1 if left or failed else 0


def _without_old(cases: Sequence[Case], old_badam: Path | None) -> list[Case]:
    if old_badam is not None and not (old_badam / "badam" / "block_optim.py").is_file():
        raise InputError(f"{old_badam} does not hold badam 1.4.", advice="Unpack its wheel there.")
    kept = [case for case in cases if case.side == "own" or old_badam is not None]
    if len(kept) < len(cases):
        _say(f"skipped: {len(cases) - len(kept)} cases with badam 1.4's optimizer, which --old-badam DIR would name")
    return kept


def start_method(device: str, out: Path) -> StartMethod:
    """How processes are made that can use the device: from a server that has loaded the libraries, or each anew.

    Raises:
        InputError: if neither can.
    """
    if device == "cpu":
        return "forkserver"
    if _can_use(device, out, "forkserver"):
        return "forkserver"
    if not _can_use(device, out, "spawn"):
        reason = _last_words(out, PROBE, 1).splitlines()[-1]
        raise InputError(
            f"The card cannot be used: {reason.rstrip('.')}.", advice="Use --device cpu for a run without one."
        )
    _say("a forked process cannot use the card here, so each process loads its libraries anew")
    return "spawn"


def _can_use(device: str, out: Path, start: StartMethod) -> bool:
    codes: list[int] = []
    limits = Limits(seconds=120, seconds_per_job=60, ahead=0)
    pool = Pool(probe, limits, lambda _name, code, _seconds: codes.append(code), start=start, preload=PRELOAD)
    pool.run([(PROBE, Job(None, device, out, ""))])
    return codes == [0]


def _has_assumptions(out: Path) -> bool:
    try:
        load_assumptions(record_path(out, ASSUMPTIONS))
    except BadamError:
        return False
    return True


def _report(out: Path, case: Case, code: int, seconds: float, limits: Limits, command: str) -> bool:
    """Say how a case ended, leave a record if its process did not, and tell whether there is a result."""
    path = record_path(out, case.name)
    # A case is run only if it had no result before, so a result is its own, even if its process died in leaving.
    if not is_done(path, case) and (code or not path.exists()):
        message = _last_words(out, case.name, code)
        if seconds >= limits.seconds_per_job:
            message = f"stopped after {seconds:.0f} s, the limit for one case; {message}"
        failure = CaseRecord(case=case, outcome="failed", message=message, provenance=plain_provenance(command))
        save_record(failure, path)
    record = load_case(path)
    _say(f"{case.name}: {_summary(record)}, {seconds:.0f} s")
    return record.is_final


def _last_words(out: Path, name: str, code: int) -> str:
    """How a process ended that left no record, with the end of what it printed."""
    ending = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    log = log_path(out, name)
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        log.unlink()
    except OSError:
        lines = []
    return "\n".join([f"the process {ending}", *lines[-12:]])


def _summary(record: CaseRecord) -> str:
    if record.run is None:
        first_line = record.message.splitlines()[-1 if record.outcome == "failed" else 0] if record.message else ""
        return f"{record.outcome}: {first_line}"
    measured = record.run.measurement.peak_allocated_bytes
    text = f"{format_bytes(measured)} allocated"
    if record.plan is None or record.plan.prediction is None or record.case.side != "own":
        return text
    return f"{text}, predicted {error_in_words(Pair(record.plan.prediction.peak_allocated_bytes, measured))}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.measure", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the records")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all cases together")
    parser.add_argument("--case-minutes", type=float, default=3.0, help="of one case, while it has the device")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="cases whose name contains it")
    parser.add_argument("--cases", type=Path, metavar="FILE", help="a JSON list of cases, instead of the table")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--old-badam", type=Path, metavar="DIR", help="where badam 1.4's wheel is unpacked")
    parser.add_argument("--ahead", type=int, metavar="N", help="processes that predict while another one measures")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and do nothing")
    return parser


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())

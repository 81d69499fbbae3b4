"""Runs one case through the three commands, in a process of its own that has imported what they need already."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from badam.plan import load_plan
from badam.profiling.record import load_measured
from benchmarks.cpu.cases import ARCHITECTURES, BATCH, Case
from benchmarks.cpu.record import Outcome, Sides

SENTENCE = "the quick brown fox jumps over a lazy dog while rain falls softly on the roof of an old house"


def import_everything() -> None:
    """Load once, in the parent, what every case would spend ten seconds on; no tensor is made."""
    import torch

    torch.set_num_threads(1)  # before the first operation: threads do not survive a fork
    for module in ("badam.training.run", "badam_planner.search.planner"):
        import_module(module)


def run_case(case: Case) -> Outcome:
    """Plan, train and compare ``case`` in a forked process.

    A run takes in every tensor of its process, so that of an earlier case must not be there.
    """
    folder = Path(tempfile.mkdtemp(prefix="badam-case-"))
    begin = time.perf_counter()
    try:
        child = os.fork()
        if child == 0:
            _in_child(case, folder)
        os.waitpid(child, 0)
        try:
            outcome = Outcome.model_validate_json((folder / "outcome.json").read_text(encoding="utf-8"))
        except OSError:
            outcome = _outcome(case, refusal="its process ended without an answer")
        return outcome.model_copy(update={"seconds": round(time.perf_counter() - begin, 2)})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _in_child(case: Case, folder: Path) -> None:
    """Never returns: what the parent would do on leaving is not ours to do."""
    code = 1
    try:
        os.chdir(folder)
        os.environ["BADAM_CACHE_DIR"] = str(folder / "cache")
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        outcome = _through_the_commands(case)
        (folder / "outcome.json").write_text(outcome.model_dump_json(), encoding="utf-8")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _through_the_commands(case: Case) -> Outcome:
    Path("model.json").write_text(json.dumps(ARCHITECTURES[case.architecture]), encoding="utf-8")
    _write_data(Path("data.jsonl"), case.seq_len)
    code, _, said = command("plan", "model.json", *case.plan_options)
    if code:
        return _outcome(case, refusal=f"badam-plan: {said}")
    code, _, said = command(
        "train", "--plan", "plan.json", "--init", "random", "--data", "data.jsonl", "--max-steps", str(case.steps),
        "--output-dir", "run",
    )  # fmt: skip
    if code:
        return _outcome(case, refusal=f"badam-train: {said}")
    code, printed, said = command("report", "plan.json", "run/measured.json", "--json", "--tolerance", "0.5%")
    if code not in (0, 1):
        return _outcome(case, refusal=f"badam-report: {said}")
    return _compared(case, json.loads(printed))


def command(name: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and last lines of complaint of one of the project's commands, called in this process."""
    output, complaint = io.StringIO(), io.StringIO()
    sys.argv = [f"badam-{name}", *arguments]
    app: typer.Typer = import_module(f"badam_cli.{name}").app
    code = 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(complaint):
        try:
            result: Any = app(list(arguments), standalone_mode=False)
            code = result if isinstance(result, int) else 0
        except SystemExit as end:
            code = int(end.code or 0)
    said = [line for line in complaint.getvalue().splitlines() if line.strip()]
    return code, output.getvalue(), " ".join(said[-2:])


def _compared(case: Case, report: dict[str, Any]) -> Outcome:
    run, plan = load_measured(Path("run/measured.json")), load_plan("plan.json")
    verdict = report["verdict"]
    return _outcome(
        case,
        allocated=_sides(report["totals"][0]),
        worst_name=verdict["worst"],
        worst_error=round(verdict["error_fraction"] or 0.0, 8),
        parts={one["name"]: _sides(one) for one in report["categories"] if one["name"]},
        phases={one["name"]: _sides(one) for one in report["phases"]},
        partition=plan.partition.strategy,
        machine=f"{run.machine.device_name}, {run.machine.platform}",
        versions={name: run.provenance.versions[name] for name in ("torch", "transformers", "trl")},
        command="python -m benchmarks.cpu_accuracy",
        date=run.provenance.date,
    )


def _outcome(case: Case, **fields: Any) -> Outcome:
    facts = {
        "name": case.name, "architecture": case.architecture, "method": case.method, "loss": case.loss,
        "checkpointing": case.checkpointing, "partition": case.partition, "batch_size": BATCH,
        "seq_len": case.seq_len, "steps": case.steps,
    }  # fmt: skip
    return Outcome.model_validate({**facts, **fields})


def _sides(row: dict[str, Any]) -> Sides:
    return Sides(predicted=row["predicted_bytes"], measured=row["measured_bytes"])


def _write_data(path: Path, seq_len: int) -> None:
    """Examples that are long enough to fill a batch of any length that is measured here, or nearly."""
    words = SENTENCE.split()
    rows = [
        {"prompt": words[index % 7], "completion": " " + " ".join(words[index % 11 :] * (seq_len // 64))}
        for index in range(16)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

"""``badam-report``: predicted against measured, in the terminal or as JSON."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from badam.errors import InputError
from badam_cli._app import reporting_errors

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def report(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan, as badam-plan wrote it.")],
    measured: Annotated[
        list[Path],
        typer.Argument(
            metavar="MEASURED...",
            help="Measured runs, as badam-train wrote them. Further plans may stand among them: each run is compared "
            "with the plan that it was started with.",
        ),
    ],
    tolerance: Annotated[
        str, typer.Option(metavar="PERCENT", help="Largest accepted error of a peak; beyond it the exit code is 1.")
    ] = "5%",
    as_json: Annotated[bool, typer.Option("--json", help="Every figure on stdout as JSON, and nothing else.")] = False,
) -> None:
    """Show what was predicted beside what was measured.

    One run is shown in full: per phase, category and block. Several are shown as a table of accuracy.
    Exit code: 0 within the tolerance, 1 beyond it, 2 bad input.
    """
    with reporting_errors():
        passed = _report([plan, *measured], parse_percent(tolerance), as_json=as_json)
    raise typer.Exit(0 if passed else 1)


def _report(paths: list[Path], tolerance: float, *, as_json: bool) -> bool:
    """Compare, show, and say whether every run is within the tolerance."""
    from badam.plan import load_plan
    from badam.profiling.record import load_measured
    from badam_planner.compare import compare, plan_of, summarize

    plans = [load_plan(path) for path in paths if path == paths[0] or _looks_like(path, "partition")]
    runs = [load_measured(path) for path in paths[1:] if not _looks_like(path, "partition")]
    if not runs:
        raise InputError(
            "Only plans were given, no measured run.", advice="Make one with badam-train --plan plan.json."
        )
    comparisons = [compare(plan_of(run, plans), run, tolerance=tolerance) for run in runs]
    accuracy = summarize(comparisons)
    if as_json:
        from badam_planner.report.as_json import accuracy_to_json, comparison_to_json

        print(comparison_to_json(comparisons[0]) if len(comparisons) == 1 else accuracy_to_json(accuracy))
    else:
        from rich.console import Console

        from badam_planner.report.terminal import render_accuracy, render_comparison

        # A terminal that cannot show a character of a model's name shows a question mark instead of a traceback.
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        Console().print(render_comparison(comparisons[0]) if len(comparisons) == 1 else render_accuracy(accuracy))
    return all(comparison.verdict.passed for comparison in comparisons)


def parse_percent(text: str) -> float:
    """A fraction from a percentage with or without its sign: ``5%`` and ``5`` are 0.05.

    Raises:
        InputError: if the text is not a number of 0 or more.
    """
    try:
        fraction = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        fraction = math.nan
    if not 0 <= fraction < math.inf:
        raise InputError(f"--tolerance {text!r} is not a percentage.", advice="Write a number such as 5% or 0.5%.")
    return fraction


def _looks_like(path: Path, field: str) -> bool:
    """Whether the file is a JSON object with ``field``; what is wrong with a file, its own loader says better."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and field in content


def main() -> None:
    """The console entry point."""
    app()

"""``badam-report``: predicted against measured, in the terminal, as JSON or as HTML."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from badam.errors import BadamError, InputError
from badam_cli._app import Version, quiet_libraries, reporting_errors, say

if TYPE_CHECKING:
    from badam_planner.accuracy.comparison import Accuracy

PLAN, MEASURED = "plan.json", "measured.json"
"""What badam-train leaves in the directory of a run."""

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def report(
    plan: Annotated[
        Path, typer.Argument(metavar="PLAN", help="The plan, as badam-plan wrote it, or the directory of a run.")
    ],
    measured: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="MEASURED...",
            help="Measured runs, as badam-train wrote them, or directories of runs. Plans may stand among them: each "
            "run is compared with the plan that it was started with.",
        ),
    ] = None,
    tolerance: Annotated[
        str,
        typer.Option(metavar="PERCENT", help="Largest error of a peak that is accepted; beyond it the exit code is 1."),
    ] = "5%",
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a self-contained HTML report.")] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate", help="Also keep what these runs show of their device, for badam-plan to plan with."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print every figure as JSON on stdout and nothing else.")
    ] = False,
    version: Version = False,
) -> None:
    """Compare what was predicted with what was measured.

    One run is shown in full, by phase, category and block; several as a table of accuracy.
    Exit code 0: every peak is within the tolerance; 1: one is beyond it; 2: bad input.
    """
    with reporting_errors():
        quiet_libraries()
        accuracy, run_paths = _compare(_files([plan, *(measured or [])]), parse_percent(tolerance))
        _show(accuracy, as_json=as_json)
        if html is not None:
            _write_html(accuracy, run_paths[0], html)
            say(f"report written to {html}")
        if calibrate:
            _calibrate(accuracy)
        passed = all(comparison.verdict.passed for comparison in accuracy.comparisons)
    raise typer.Exit(0 if passed else 1)


def _files(paths: list[Path]) -> list[Path]:
    """The files that are meant: of a run's directory, its plan and its record; plans come first."""
    found = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        if not (path / MEASURED).is_file():
            raise InputError(
                f"{path} holds no {MEASURED}, so no run was completed there.",
                advice="Give the --output-dir of a finished run of badam-train.",
            )
        found += [path / name for name in (PLAN, MEASURED) if (path / name).is_file()]
    return found


def _compare(paths: list[Path], tolerance: float) -> tuple[Accuracy, list[Path]]:
    """Every run beside its plan, and the files of the runs."""
    from badam.plan import load_plan
    from badam.profiling.record import load_measured
    from badam_planner.accuracy.compare import compare, plan_of, summarize

    if _looks_like(paths[0], "measurement"):
        raise InputError(
            f"{paths[0]} is a measured run, not a plan.", advice="The plan comes first: badam-report PLAN MEASURED."
        )
    plan_paths = [paths[0], *(path for path in paths[1:] if _looks_like(path, "partition"))]
    run_paths = [path for path in paths[1:] if not _looks_like(path, "partition")]
    if not run_paths:
        raise InputError(
            "Only plans were given, no measured run.", advice="Make one with badam-train --plan plan.json."
        )
    plans, runs = [load_plan(path) for path in plan_paths], [load_measured(path) for path in run_paths]
    comparisons = [compare(plan_of(run, plans), run, tolerance=tolerance) for run in runs]
    return summarize(comparisons), run_paths


def _show(accuracy: Accuracy, *, as_json: bool) -> None:
    """One comparison in full, or several as a table."""
    comparisons = accuracy.comparisons
    if as_json:
        from badam_planner.report.json import accuracy_to_json, comparison_to_json

        print(comparison_to_json(comparisons[0]) if len(comparisons) == 1 else accuracy_to_json(accuracy))
    else:
        from rich.console import Console

        from badam_planner.report.terminal.comparison import render_accuracy, render_comparison

        # A terminal that cannot show a character of a model's name shows a question mark instead of a traceback.
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        Console().print(render_comparison(comparisons[0]) if len(comparisons) == 1 else render_accuracy(accuracy))


def _write_html(accuracy: Accuracy, measured: Path, html: Path) -> None:
    from badam_planner.report.html.gather import read_curve, read_modules, rehearse_step
    from badam_planner.report.html.pages import write_accuracy_html, write_comparison_html

    if len(accuracy.comparisons) > 1:
        write_accuracy_html(accuracy, html)
        return
    comparison = accuracy.worst
    say("rehearsing one step to draw it")
    try:
        timeline = rehearse_step(comparison.plan)
    except BadamError as error:  # the rest of the report stands without this chart
        say(f"no timeline in the report: {error.message}")
        timeline = None
    try:
        modules = read_modules(measured, comparison.run.plan_digest)
    except BadamError as error:
        say(f"no modules in the report: {error.message}")
        modules = None
    write_comparison_html(comparison, html, timeline=timeline, curve=read_curve(measured), modules=modules)


def _calibrate(accuracy: Accuracy) -> None:
    """Add the runs to what is known of their device."""
    from badam_planner.accuracy.calibration import calibrate
    from badam_planner.sources.calibration_store import device_key, load_calibration, save_calibration

    gpu = device_key(accuracy.comparisons[0].run.machine)
    runs = [(comparison.plan, comparison.run) for comparison in accuracy.comparisons]
    calibration = calibrate(gpu, runs, load_calibration(gpu))
    path = save_calibration(calibration)
    say(calibration.sentence())
    say(f"kept in {path}")


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
    """Console entry point."""
    app()


if __name__ == "__main__":
    main()

"""The pictures of the README: what the commands print as SVG, what their pages show through a headless Chromium.

The report is that of the run stored in benchmarks/records/demo; ``--run`` plans and trains it again. Without a Chromium
only the SVG files are written.

    python -m benchmarks.pictures [--run]
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console, Group, RenderableType

from badam.plan import load_plan
from badam.profiling.record import load_measured
from badam_planner.accuracy.compare import compare
from badam_planner.report.html.gather import read_curve, sizes_that_fit
from badam_planner.report.html.page import Page, render_page
from badam_planner.report.html.pages import comparison_page, plan_page
from badam_planner.report.terminal.comparison import render_comparison
from badam_planner.report.terminal.plan import render_candidates, render_peak
from badam_planner.search.model_spec import describe_model
from badam_planner.search.planner import Request, make_plan
from badam_planner.sources.target import find_target

ROOT = Path(__file__).parents[1]
STORED = ROOT / "benchmarks" / "records" / "demo"
PICTURES = ROOT / "docs" / "pictures"
KEPT = ("plan.json", "measured.json", "metrics.jsonl")
PLAN = [
    "badam/demo-llama-12m", "--gpu", "cpu", "--batch-size", "4", "--seq-len", "128", "--partition", "layer",
    "--include-embedding", "--include-lm-head", "--checkpointing", "all", "--switch-every", "4",
    "--learning-rate", "3e-3", "--output", "plan.json",
]  # fmt: skip
TRAIN = ["--plan", "plan.json", "--output-dir", "run", "--max-steps", "120", "--pad-to", "plan"]
WIDTH, COLUMNS = 900, 100
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--virtual-time-budget=8000", "--blink-settings=preferredColorScheme=1",
)  # fmt: skip


def run_again() -> None:
    """Plan and train the stored run."""
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in (("plan", PLAN), ("train", TRAIN)):
            command = [sys.executable, "-m", f"badam_cli.{name}", *arguments]
            subprocess.run(command, cwd=folder, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})
        STORED.mkdir(parents=True, exist_ok=True)
        for kept in KEPT:
            shutil.copy(Path(folder, "run", kept), STORED / kept)


def as_svg(name: str, title: str, renderable: RenderableType) -> None:
    """What a terminal would show."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(renderable)
    # Without the fonts that rich would load from elsewhere: every system has one of fixed width.
    picture = re.sub(r"@font-face \{.*?\}", "", console.export_svg(title=title), flags=re.DOTALL)
    (PICTURES / f"{name}.svg").write_text(picture, encoding="utf-8")


def photograph(page: Page, identity: str, name: str) -> None:
    """One chart of a page as a browser draws it."""
    (chart,) = (one for one in page.charts if one.identity == identity)
    alone = render_page(replace(page, charts=(chart,)))
    hidden = "header, nav, footer, #summary, details, .modebar-container { display: none !important }"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        path.write_text(
            alone.replace("</style>", f"{hidden} body {{ padding: 0 1rem }} h2 {{ margin-top: .5rem }}</style>")
        )
        assert CHROMIUM is not None, "asked before"
        size = f"--window-size={WIDTH},{chart.height + 130}"
        picture = f"--screenshot={PICTURES / name}.png"
        profile = f"--user-data-dir={folder}/profile"
        subprocess.run([CHROMIUM, *FLAGS, profile, size, picture, path.as_uri()], check=True, capture_output=True)


def main() -> None:
    """Write all pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", action="store_true", help="plan and train the stored run again")
    options = parser.parse_args()
    if options.run:
        run_again()
    PICTURES.mkdir(parents=True, exist_ok=True)
    model, gpu = "meta-llama/Llama-2-7b-hf", "rtx3090"
    request = Request(
        spec=describe_model(model), target=find_target(gpu), batch_size=2, seq_len=512, compare_methods=True,
        command=f"badam-plan {model} --gpu {gpu} --batch-size 2 --seq-len 512 --compare-methods",
    )  # fmt: skip
    answer = make_plan(request)
    assert answer.plan is not None, "it fits"
    best = next(one for one in answer.result.candidates if one.recommended)
    tables = Group(render_candidates(answer.result), "", render_peak(best, answer.result.usable_bytes))
    as_svg("plan", request.command, tables)
    stored = compare(load_plan(STORED / "plan.json"), load_measured(STORED / "measured.json"))
    as_svg("report", "badam-report plan.json run/measured.json", render_comparison(stored))
    if CHROMIUM is None:
        print("no chromium on this machine: the charts were left as they are", file=sys.stderr)
        return
    planned = plan_page(answer.plan, result=answer.result, sizes=sizes_that_fit(answer.plan))
    for identity in ("methods", "sizes"):
        photograph(planned, identity, identity)
    measured = comparison_page(stored, curve=read_curve(STORED / "measured.json"))
    for identity in ("loss",):
        photograph(measured, identity, f"run-{identity}")
    for path in sorted(PICTURES.iterdir()):
        print(f"{path.stat().st_size:8,} B  {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

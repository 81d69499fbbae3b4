"""Predicted memory beside what others published: writes docs/published.md.

python -m benchmarks.published
"""

from __future__ import annotations

import json
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from badam.plan import Attention
from badam.units import GB, format_gib
from badam_planner.planning import Request, make_plan
from badam_planner.probe.model_source import describe_model
from badam_planner.probe.target import find_target
from badam_planner.result import Candidate

PAGE = Path(__file__).parents[1] / "docs" / "published.md"

HEAD = """# Predicted beside published

Written by `python -m benchmarks.published` with torch {torch} and transformers {transformers}. GB = 1e9 bytes;
published figures and their sources are in `profiles/published.json`. The published runs used transformers 4.35 and
eager attention, and do not say whether their totals are allocated, reserved or device memory; predictions are shown for
both kinds of attention that a run of today can have.

| run on an RTX 3090 | published | attention | allocated | reserved | device | device against published |
|---|---|---|---|---|---|---|
"""

TAIL = """
What is left: the context of the device (an assumption of the card's record), the version of the library, and the
fragmentation of a long run, which the rehearsal of one visit does not have.
"""


def predict(run: dict[str, Any], attention: Attention) -> Candidate:
    """The one candidate that a published run corresponds to."""
    request = Request(
        spec=describe_model(run["model"]),
        target=find_target(run["gpu"]),
        method=run["method"],
        partition=run["partition"],
        batch_size=run["batch_size"],
        seq_len=run["seq_len"],
        checkpointing=run["checkpointing"],
        loss=run["loss"],
        attention=attention,
    )
    return make_plan(request).result.candidates[0]


def row(run: dict[str, Any], attention: Attention) -> str:
    """One line of the table."""
    found = predict(run, attention)
    published = run["measured_bytes"]
    said = f"{published / GB:.1f} GB" if published else "fits"
    sizes = (found.peak_allocated_bytes, found.peak_reserved_bytes, found.peak_device_bytes)
    verdict = (
        f"{100 * (found.peak_device_bytes / published - 1):+.1f} %"
        if published
        else f"{'fits' if found.fits else 'does not fit'}, {format_gib(found.headroom_bytes)} GiB left"
    )
    name = f"[{run['model']} {run['batch_size']}×{run['seq_len']}]({run['source'].split(',')[0]})"
    columns = [name, said, attention, *(f"{size / GB:.2f}" for size in sizes), verdict]
    return f"| {' | '.join(columns)} |\n"


def main() -> None:
    """Predict every published run with both kinds of attention and write the page."""
    content = json.loads((files("badam_profiles") / "published.json").read_text(encoding="utf-8"))
    rows = [row(run, cast(Attention, attention)) for run in content["runs"] for attention in ("eager", "sdpa")]
    head = HEAD.format(torch=version("torch").split("+")[0], transformers=version("transformers"))
    PAGE.write_text(head + "".join(rows) + TAIL, encoding="utf-8")
    print("".join(rows))


if __name__ == "__main__":
    main()

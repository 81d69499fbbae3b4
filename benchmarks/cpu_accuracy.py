"""Predicted against measured memory on this CPU, through the three commands: writes docs/accuracy-cpu.md.

Every partition of the small catalogued model, with and without checkpointing, with both losses, is planned, trained so
that every block is visited for two steps, and compared. Plans and measured runs are kept in profiles/measured/cpu.

    python -m benchmarks.cpu_accuracy
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "accuracy-cpu.md"
RECORDS = ROOT / "profiles" / "measured" / "cpu"
MODEL = "badam/demo-llama-12m"
BATCH, LENGTH, VISIT = 2, 64, 2
PARTITIONS = {"layer": 8, "attn-mlp": 16, "matrix": 56}

HEAD = """# Accuracy on CPU

Written by `python -m benchmarks.cpu_accuracy` from the records in `profiles/measured/cpu`: `{model}`, batch
{batch}×{length}, bf16, {visit} steps per visit, every block visited once; {machine}; torch {torch}, transformers
{transformers}; {date}. The peak is predicted by `badam-plan` and measured by the CPU allocator's own events under
`badam-train`. *Worst block* is the largest error of any block's own peak.

| partition | D | checkpointing | loss | predicted B | measured B | error B | error | worst block |
|---|---|---|---|---|---|---|---|---|
"""


def command(module: str, *arguments: str | Path, folder: Path) -> str:
    """Standard output of one of the project's commands; a report that is beyond its tolerance is an answer too."""
    process = subprocess.run(
        [sys.executable, "-m", f"badam_cli.{module}", *map(str, arguments)], cwd=folder, capture_output=True, text=True
    )
    if process.returncode > 1:
        raise SystemExit(f"badam-{module} ended with {process.returncode}: {process.stderr}")
    return process.stdout


def measure(partition: str, checkpointing: str, loss: str) -> dict[str, Any]:
    """Plan, train and compare one configuration; the plan and the measured run are kept."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command(
            "plan", MODEL, "--gpu", "cpu", "--batch-size", str(BATCH), "--seq-len", str(LENGTH), "--switch-every",
            str(VISIT), "--partition", partition, "--checkpointing", checkpointing, "--loss", loss, folder=folder,
        )  # fmt: skip
        steps = str(VISIT * PARTITIONS[partition])
        command("train", "--plan", "plan.json", "--init", "random", "--max-steps", steps, "--output-dir", "run",
                folder=folder)  # fmt: skip
        compared: dict[str, Any] = json.loads(command("report", "plan.json", "run/measured.json", "--json",
                                                      folder=folder))  # fmt: skip
        kept = RECORDS / f"{partition}-{checkpointing}-{loss}"
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "plan.json", kept / "plan.json")
        shutil.copy(folder / "run" / "measured.json", kept / "measured.json")
        return compared


def row(kept: Path) -> str:
    """One line of the table, from a plan and its measured run."""
    plan = json.loads((kept / "plan.json").read_text())
    run = json.loads((kept / "measured.json").read_text())["measurement"]
    predicted, measured = plan["prediction"]["peak_allocated_bytes"], run["peak_allocated_bytes"]
    blocks = {block["name"]: block["peak_allocated_bytes"] for block in plan["partition"]["blocks"]}
    errors = [100 * (blocks[one["name"]] / one["peak_allocated_bytes"] - 1) for one in run["blocks"]]
    worst = max(errors, key=abs)
    training = plan["training"]
    return (
        f"| {plan['partition']['strategy']} | {len(blocks)} | {training['checkpointing']} | {training['loss']} | "
        f"{predicted:,} | {measured:,} | {predicted - measured:+,} | {100 * (predicted / measured - 1):+.4f} % | "
        f"{worst:+.4f} % |\n"
    )


def main() -> None:
    """Measure all configurations and write the page."""
    configurations = list(itertools.product(PARTITIONS, ("none", "all"), ("full", "chunked")))
    for which in configurations:
        measure(*which)
        print(*which, file=sys.stderr, flush=True)
    folders = [RECORDS / "-".join(which) for which in configurations]
    record = json.loads((folders[-1] / "measured.json").read_text())
    versions, machine = record["provenance"]["versions"], record["machine"]
    head = HEAD.format(
        model=MODEL, batch=BATCH, length=LENGTH, visit=VISIT, torch=versions["torch"].split("+")[0],
        transformers=versions["transformers"], date=record["provenance"]["date"][:10],
        machine=f"{machine['device_name']}, {machine['cpu_count']} CPUs",
    )  # fmt: skip
    rows = [row(folder) for folder in folders]
    PAGE.write_text(head + "".join(rows), encoding="utf-8")
    print("".join(rows))


if __name__ == "__main__":
    main()

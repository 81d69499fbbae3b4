"""The ratio optimizer's step and memory against badam 1.4's, both sides in one run.

Both are asked in turn. Times are CPU seconds of a process with one thread, which other work on the machine hardly
lengthens.

    pip download badam==1.4 --no-deps && unzip badam-1.4-py3-none-any.whl -d badam14
    python -m benchmarks.ratio_step --badam14 badam14 --doc docs/ratio.md

``--badam14`` may also be the Python interpreter of an environment that has it. ``--doc`` alone writes the table of the
stored results again.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.ratio_worker import BURST, RATIO, SHAPES
from benchmarks.two_sides import Comparison, SideName, both_sides

WORDS = {
    "layer": "one layer, 9 tensors",
    "model": "nine layers, 83 tensors",
    "adjacent": "adjacent",
    "scatter": "scatter, runs of 16",
    "scatter-1": "scatter, single entries",
}
CASES = [(shapes, mode) for shapes in SHAPES for mode in ("adjacent", "scatter", "scatter-1")]


def compare(badam14: Path, repeats: int) -> list[dict[str, Any]]:
    """Medians of both sides for every case."""
    rows = []
    with both_sides("benchmarks.ratio_worker", badam14) as sides:
        for shapes, mode in CASES:
            case = f"{shapes} {mode}"
            found: dict[SideName, list[dict[str, float]]] = {"old": [], "new": []}
            for turn in range(repeats + 1):
                for name in found:
                    results = sides.ask(name, case)
                    if turn:  # the first steps make state and fill caches
                        found[name] += results
            row: dict[str, Any] = {"shapes": shapes, "mode": mode}
            for name, results in found.items():
                for key in ("backward", "step"):
                    row[f"{name}_{key}_seconds"] = statistics.median(result[key] for result in results)
                row[f"{name}_bytes_per_active_entry"] = results[-1]["bytes"]
            row["step_times_faster"] = row["old_step_seconds"] / row["new_step_seconds"]
            rows.append(row)
    return rows


def table(record: dict[str, Any]) -> str:
    """The results as a Markdown table with its provenance."""
    heads = (
        "parameters",
        "mode",
        "step, 1.4",
        "step",
        "faster",
        "in backward, 1.4",
        "in backward",
        "B/entry, 1.4",
        "B/entry",
    )
    lines = ["| " + " | ".join(heads) + " |", "|---|---" + "|---:" * 7 + "|"]
    for row in record["results"]:
        cells = [
            WORDS[row["shapes"]],
            WORDS[row["mode"]],
            f"{row['old_step_seconds'] * 1e3:.1f} ms",
            f"{row['new_step_seconds'] * 1e3:.2f} ms",
            f"{row['step_times_faster']:.0f} times",
            f"{row['old_backward_seconds'] * 1e3:.1f} ms",
            f"{row['new_backward_seconds'] * 1e3:.2f} ms",
            f"{row['old_bytes_per_active_entry']:.1f}",
            f"{row['new_bytes_per_active_entry']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    entries = ", ".join(f"{sum(_numel(s) for s in shapes) / 1e6:.1f} M ({WORDS[n]})" for n, shapes in SHAPES.items())
    versions = record["versions"]
    source = (
        f"bf16, {RATIO:.0%} of the entries active; {entries}. Medians of {record['repeats'] * BURST} steps, CPU time "
        f"of one thread; {record['machine']}, Python {versions['python']}, torch {versions['torch']}, "
        f"{record['date']}. Command: `{record['command']}`"
    )
    lines += ["", source]
    return "\n".join(lines)


def _numel(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


SUMMARY = "The ratio optimizer's step and memory against badam 1.4's, both sides in one run."
COMPARISON = Comparison("ratio_step", SUMMARY, compare, table, repeats=6)

if __name__ == "__main__":
    COMPARISON.main()

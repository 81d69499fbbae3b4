"""BlockOptimizer against badam 1.4 and against bare fused AdamW: step, switch, live bytes, retained movement.

All sides are asked in turns within one run; times are CPU seconds of a process with one thread.

    pip download badam==1.4 --no-deps && unzip badam-1.4-py3-none-any.whl -d badam14
    python -m benchmarks.optimizer_step --badam14 badam14

``--doc docs/optimizers.md`` puts the table of the stored results into the documentation.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.two_sides import Comparison, SideName, both_sides

WORKER = "benchmarks.optimizer_worker"
BURST = 5
"""Measurements of one kind before another has its turn: training is not interrupted at every step either."""


class Quantity(NamedTuple):
    """A row of the table: what 1.4 and this project take, in units of a reference measured on the same side."""

    words: str
    old: str | None  # name of the measurement in optimizer_worker.py
    new: str
    unit: str  # the reference measurement, or the unit itself
    bar: float | None


QUANTITIES = (
    Quantity("step after backward, any base / bare AdamW", "step", "step", "bare_step", 1.75),
    Quantity('step after backward, `update="compiled"` / bare AdamW', "step", "compiled_step", "bare_step", 1.15),
    Quantity("… with backward's share, any base / bare AdamW", None, "backward_and_step", "bare_step", None),
    Quantity(
        '… with backward\'s share, `update="compiled"` / bare AdamW',
        None,
        "backward_and_compiled_step",
        "bare_step",
        None,
    ),
    Quantity("switch, nearest / one copy to fp32", "switch", "switch", "copy_to_fp32", 2.0),
    Quantity("switch, stochastic / one copy to fp32", None, "stochastic_switch", "copy_to_fp32", 6.0),
    Quantity("live bytes per active parameter", "live_bytes", "live_bytes", "bytes", 16.0),
    Quantity('live bytes, `update="compiled"`', None, "compiled_live_bytes", "bytes", 16.0),
    Quantity("live bytes, `gradient_release=True`, less one tensor", None, "release_live_bytes", "bytes", 12.5),
    Quantity("movement retained at lr 1e-6, stochastic", "retained", "retained", "fraction", None),
    Quantity("movement retained at lr 1e-6, nearest", "retained", "nearest_retained", "fraction", None),
)
TIMED = ("bare_step", "copy_to_fp32")


def compare(badam14: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Medians of every measurement of both sides."""
    names: dict[SideName, dict[str, None]] = {
        "old": dict.fromkeys([*TIMED, *(q.old for q in QUANTITIES if q.old)]),
        "new": dict.fromkeys([*TIMED, *(q.new for q in QUANTITIES)]),
    }
    once = {q.new for q in QUANTITIES if q.unit not in TIMED} | {q.old for q in QUANTITIES if q.unit not in TIMED}
    found: dict[SideName, dict[str, list[float]]] = {side: {name: [] for name in names[side]} for side in names}
    with both_sides(WORKER, badam14) as sides:
        for turn in range(repeats + 1):
            for side, measurements in names.items():
                for name in measurements:
                    if name in once:
                        continue
                    results = sides.ask(side, f"{name} {BURST}")
                    if turn:  # the first ones make state, compile and fill caches
                        found[side][name] += results
        for side, measurements in names.items():
            for name in measurements:
                if name in once:
                    found[side][name] = sides.ask(side, f"{name} 1")
    return {side: {name: statistics.median(values) for name, values in found[side].items()} for side in found}


def rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Each quantity in its unit, with its bar and whether it is kept."""
    made = []
    for quantity in QUANTITIES:

        def value(side: str, name: str | None, unit: str = quantity.unit) -> float | None:
            if name is None:
                return None
            measured = record["results"][side]
            return float(measured[name] / measured[unit]) if unit in TIMED else float(measured[name])

        new = value("new", quantity.new)
        assert new is not None
        kept = None if quantity.bar is None else round(new, 2) <= quantity.bar
        made.append(
            {
                "words": quantity.words,
                "old": value("old", quantity.old),
                "new": new,
                "bar": quantity.bar,
                "kept": kept,
                "timed": quantity.unit in TIMED,
            }
        )
    return made


def table(record: dict[str, Any]) -> str:
    """The results as a Markdown table with its provenance."""
    lines = ["| what | 1.4 | here | bar |", "|---|---:|---:|---|"]
    for row in rows(record):
        sign = "×" if row["timed"] else ""
        old = "" if row["old"] is None else f"{row['old']:.2f}{sign}"
        bar = "" if row["bar"] is None else f"≤ {row['bar']:g}{sign}, {'kept' if row['kept'] else 'missed'}"
        lines.append(f"| {row['words']} | {old} | {row['new']:.2f}{sign} | {bar} |")
    bare, copy = (record["results"]["new"][name] * 1e3 for name in TIMED)
    versions = record["versions"]
    source = (
        "One layer of a Llama of hidden size 1024, 12.8 M bf16 parameters in 9 tensors. Bare fused AdamW takes "
        f"{bare:.1f} ms, one copy to fp32 {copy:.1f} ms; medians of {record['repeats'] * BURST}, CPU time of one "
        f"thread; {record['machine']}, Python {versions['python']}, torch {versions['torch']}, {record['date']}. "
        f"Command: `{record['command']}`"
    )
    lines += ["", source]
    return "\n".join(lines)


SUMMARY = "BlockOptimizer against badam 1.4 and against bare fused AdamW: step, switch, live bytes, retained movement."
COMPARISON = Comparison("optimizer_step", SUMMARY, compare, table, repeats=8)

if __name__ == "__main__":
    COMPARISON.main()

"""The table in the documentation is that of the stored results."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import optimizer_step

ROOT = Path(__file__).resolve().parents[2]
RESULTS = optimizer_step.COMPARISON.stored


def test_the_table_in_the_documentation_is_that_of_the_stored_results() -> None:
    record = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert optimizer_step.table(record) in (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")


def test_the_stored_results_keep_the_bars_on_memory_and_movement() -> None:
    rows = {row["words"]: row for row in optimizer_step.rows(json.loads(RESULTS.read_text(encoding="utf-8")))}
    assert all(row["kept"] for words, row in rows.items() if "live bytes" in words)
    assert rows["movement retained at lr 1e-6, stochastic"]["new"] > 0.9
    assert rows["movement retained at lr 1e-6, nearest"]["new"] < 0.5

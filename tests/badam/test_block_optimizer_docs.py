"""The table in the documentation is that of the stored results."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import against_1_4, optimizer_step

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


def test_the_summary_for_those_who_come_from_1_4_is_that_of_the_stored_results() -> None:
    page = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    assert f"{against_1_4.BEGIN}\n{against_1_4.table()}\n" in page
    assert against_1_4.table().count("\n") == 1 + len(against_1_4.BLOCK_ROWS) + len(against_1_4.RATIO_ROWS) + 1

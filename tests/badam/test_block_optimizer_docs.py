"""The table in the documentation is that of the stored results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "optimizer_step.json"


def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("optimizer_step", ROOT / "benchmarks" / "optimizer_step.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_in_the_documentation_is_that_of_the_stored_results() -> None:
    record = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert benchmark().table(record) in (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")


def test_the_stored_results_keep_the_bars_on_memory_and_movement() -> None:
    rows = {row["words"]: row for row in benchmark().rows(json.loads(RESULTS.read_text(encoding="utf-8")))}
    assert all(row["kept"] for words, row in rows.items() if "live bytes" in words)
    assert rows["movement retained at lr 1e-6, stochastic"]["new"] > 0.9
    assert rows["movement retained at lr 1e-6, nearest"]["new"] < 0.5

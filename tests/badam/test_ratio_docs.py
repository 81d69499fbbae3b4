from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("ratio_step", ROOT / "benchmarks" / "ratio_step.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_in_the_documentation_is_that_of_the_stored_results() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "ratio_step.json").read_text(encoding="utf-8"))
    assert benchmark().table(record) in (ROOT / "docs" / "ratio.md").read_text(encoding="utf-8")


def test_the_stored_results_keep_the_promised_memory() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "ratio_step.json").read_text(encoding="utf-8"))
    for row in record["results"]:
        assert row["new_bytes_per_active_entry"] <= (16 if row["mode"] == "adjacent" else 20)
        assert row["old_bytes_per_active_entry"] > 20

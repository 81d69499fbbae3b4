from __future__ import annotations

import json
from pathlib import Path

from benchmarks import ratio_step

ROOT = Path(__file__).resolve().parents[3]


def test_the_table_in_the_documentation_is_that_of_the_stored_results() -> None:
    record = json.loads(ratio_step.COMPARISON.stored.read_text(encoding="utf-8"))
    assert ratio_step.table(record) in (ROOT / "docs" / "ratio.md").read_text(encoding="utf-8")


def test_the_stored_results_keep_the_promised_memory() -> None:
    record = json.loads(ratio_step.COMPARISON.stored.read_text(encoding="utf-8"))
    for row in record["results"]:
        assert row["new_bytes_per_active_entry"] <= (16 if row["mode"] == "adjacent" else 20)
        assert row["old_bytes_per_active_entry"] > 20

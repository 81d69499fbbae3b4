"""The documentation of the block optimizer: its tables are those of the stored results, and its example runs."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch

from badam import BlockOptimizer
from benchmarks import against_1_4, optimizer_step
from tests.conftest import BatchFactory, ModelFactory

ROOT = Path(__file__).resolve().parents[3]
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


def test_the_loop_in_the_documentation_trains_and_resumes_within_a_visit(
    tiny_llama: ModelFactory, token_batch: BatchFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")
    section = page.partition("## In a loop of your own")[2].partition("\n## ")[0]
    loop, resume = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    batches = ({"input_ids": tokens, "labels": tokens} for tokens in map(token_batch, itertools.count()))
    names = {"torch": torch, "model": tiny_llama(), "batches": batches, "steps": 53, "accumulate": 2}
    exec(loop, names)
    optimizer, again = names["optimizer"], tiny_llama(seed=1)
    assert (optimizer.global_step, optimizer.visit, optimizer.steps_in_visit) == (53, 1, 3)
    resumed = BlockOptimizer(torch.optim.AdamW(again.parameters()), list(again.named_parameters()), verbose=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(resumed, T_max=53)
    exec(resume, {"torch": torch, "parts": {"model": again, "optimizer": resumed, "scheduler": schedule}})
    assert (resumed.global_step, resumed.visit, resumed.steps_in_visit) == (53, 1, 3)
    assert schedule.last_epoch == 53
    for name, master in optimizer.masters.items():
        assert torch.equal(resumed.masters[name], master)

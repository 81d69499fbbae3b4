"""The cases on the CPU, their records and the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from badam.training.methods import METHODS
from benchmarks.cpu.cases import ARCHITECTURES, LENGTHS, STEPS, all_cases
from benchmarks.cpu.page import page
from benchmarks.cpu.record import FOLDER, Outcome, Sides, load_outcomes, save_outcomes
from benchmarks.cpu.run import command


def outcome(name: str, predicted: int = 1000, measured: int = 1000, **changes: Any) -> Outcome:
    fields: dict[str, Any] = {
        "name": name, "architecture": name.partition("-")[0], "method": "badam", "checkpointing": "all",
        "loss": "full", "partition": "layer", "batch_size": 2, "seq_len": 64, "steps": 6,
        "allocated": Sides(predicted=predicted, measured=measured), "worst_name": "allocated",
        "worst_error": (predicted - measured) / measured, "phases": {"loss": Sides(predicted=90, measured=100)},
        "versions": {"torch": "2.13.0+cpu"}, "machine": "A machine", "date": "2026-01-02T03:04:05Z", **changes,
    }  # fmt: skip
    return Outcome.model_validate(fields)


def test_twelve_architectures_meet_every_method_that_trains_on_a_cpu() -> None:
    cases = list(all_cases())
    names = [case.name for case in cases]
    assert len(names) == len(set(names))
    assert len(ARCHITECTURES) == 12
    assert set(STEPS) == set(METHODS) - {"qlora"}
    crossed = {(case.architecture, case.method, case.checkpointing, case.seq_len) for case in cases}
    assert len(crossed) == 12 * len(STEPS) * 2 * len(LENGTHS)


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    kept = [outcome("llama-badam-all-full-64"), outcome("gpt2-badam-all-full-64", refusal="no", allocated=None)]
    save_outcomes(kept, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt2.json", "llama.json"]
    assert load_outcomes(tmp_path) == {one.name: one for one in kept}


def test_the_page_names_the_worst_and_what_is_missing() -> None:
    cases = list(all_cases())
    refused = outcome(cases[2].name, refusal="badam-plan: it does not", allocated=None)
    text = page([outcome(cases[0].name), outcome(cases[1].name, 990), refused], cases)
    assert "**1 of 2 measured cases" in text
    assert f"-1.0000% ({cases[1].name}, allocated)" in text
    assert f"{len(cases) - 2} of {len(cases)} cases have no measurement" in text
    assert f"* {cases[2].name}: badam-plan: it does not" in text
    assert "loss -10.00%" in text
    assert "Nothing has been measured" in page([], cases)


def test_the_stored_page_is_made_from_the_stored_records() -> None:
    stored = FOLDER.parents[2] / "docs" / "accuracy-cpu.md"
    assert stored.read_text(encoding="utf-8") == page(list(load_outcomes().values()), list(all_cases()))


def test_a_command_that_refuses_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    code, printed, said = command("report", "absent.json", "absent.json")
    assert (code, printed) == (2, "")
    assert "Cannot read the plan" in said

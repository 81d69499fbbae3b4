"""The list of benchmarks."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from benchmarks import __main__ as command


def test_every_benchmark_is_listed_with_a_sentence_and_can_be_found() -> None:
    known = command.available()
    assert set(command.ALONE) <= set(known)
    assert {"gpu.measure", "optimizer_step"} <= set(known)
    assert not any(name.endswith("worker") for name in known)
    for name, sentence in known.items():
        assert sentence, name
        assert importlib.util.find_spec(f"benchmarks.{name}") is not None


def test_without_a_name_nothing_is_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    monkeypatch.setattr(command, "run", lambda name: pytest.fail(f"ran {name}"))
    command.main()
    assert "cpu_accuracy" in capsys.readouterr().out


def test_an_unknown_name_is_bad_input_and_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "published", "nothing"])
    monkeypatch.setattr(command, "run", lambda name: pytest.fail(f"ran {name}"))
    with pytest.raises(SystemExit, match="2"):
        command.main()


def test_the_worst_exit_code_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "published", "planning_time"])
    monkeypatch.setattr(command, "run", lambda name: {"published": 1, "planning_time": 0}[name])
    with pytest.raises(SystemExit, match="1"):
        command.main()

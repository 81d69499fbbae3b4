"""The console entry point of badam-plan."""

from __future__ import annotations

import atexit
import gc
from pathlib import Path

import pytest

from badam.plan import load_plan
from badam_cli import _plan_output
from badam_cli import plan as command
from badam_planner.search.result import Answer, SearchResult
from tests.badam_planner import factories


def test_the_end_of_the_command_does_not_look_for_cycles_through_all_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    at_the_end: list[object] = []
    monkeypatch.setattr(atexit, "register", at_the_end.append)
    monkeypatch.setattr(command, "app", lambda: None)
    command.main()
    assert at_the_end == [gc.freeze]


def test_the_plan_is_there_even_if_the_reader_of_the_table_goes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, output = factories.plan(), tmp_path / "plan.json"

    def closed(answer: Answer, epochs: float) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(_plan_output, "show", closed)
    answer = Answer(SearchResult("model", "card", 9, 1, 2, ()), plan, None)
    with pytest.raises(BrokenPipeError):
        _plan_output.present(answer, output, None, epochs=1, as_json=False)
    assert load_plan(output) == plan

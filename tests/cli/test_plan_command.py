"""The console entry point of badam-plan."""

from __future__ import annotations

import atexit
import gc

import pytest

from badam_cli import plan as command


def test_the_end_of_the_command_does_not_look_for_cycles_through_all_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    at_the_end: list[object] = []
    monkeypatch.setattr(atexit, "register", at_the_end.append)
    monkeypatch.setattr(command, "app", lambda: None)
    command.main()
    assert at_the_end == [gc.freeze]

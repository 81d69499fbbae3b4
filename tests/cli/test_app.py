"""What the three commands have in common, and what they say on a plain installation."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

import badam
from badam import errors
from badam.errors import InputError
from badam.plan import save_record
from badam_cli import train as train_command
from tests.badam_planner import factories

COMMANDS = ("badam-plan", "badam-train", "badam-report")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_tells_its_version_without_any_argument(command: str) -> None:
    app = importlib.import_module(command.replace("badam-", "badam_cli.")).app
    result = CliRunner().invoke(app, ["--version"], prog_name=command)
    assert result.exit_code == 0
    assert result.stdout == f"{command} {badam.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_shell_can_complete_the_options_of_a_command(command: str) -> None:
    request = {
        f"_{command.upper().replace('-', '_')}_COMPLETE": "complete_bash",
        "COMP_WORDS": f"{command} --ver",
        "COMP_CWORD": "1",
    }
    script = Path(sys.executable).parent / command
    result = subprocess.run([script], env={**os.environ, **request}, capture_output=True, text=True)
    assert result.stdout.split() == ["--version"]


def test_badam_train_names_the_libraries_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = ("trl", "datasets", "accelerate")
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name in absent else find_spec(name))
    save_record(factories.plan(), tmp_path / "plan.json")
    result = CliRunner().invoke(train_command.app, ["--plan", str(tmp_path / "plan.json")])
    assert result.exit_code == 2
    assert "badam-train needs trl, datasets and accelerate, which cannot be imported here." in result.stderr
    assert "pip install 'badam[train]'" in result.stderr


def test_nothing_is_said_where_all_libraries_are_there() -> None:
    errors.require("the interpreter", {"json": "json"}, extra="train")
    with pytest.raises(InputError, match=re.escape("needs no-such-thing, which")):
        errors.require("nobody", {"json": "json", "no_such_thing": "no-such-thing"}, extra="train")

"""The demo shows commands that exist, in an order that works."""

from __future__ import annotations

import importlib
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main

from badam.blocks.schedule import BlockSchedule
from badam_cli import demo


def options_of(name: str, arguments: list[str]) -> dict[str, Any]:
    """What a command understands of ``arguments``; fails on an option that it does not have."""
    app = importlib.import_module(demo.COMMANDS[name]).app
    parsed = typer.main.get_command(app).make_context(name, list(arguments))
    return dict(parsed.params)


def parsed_script() -> list[tuple[str, dict[str, Any]]]:
    commands = [shlex.split(command) for _, command in demo.SCRIPT]
    return [(name, options_of(name, arguments)) for name, *arguments in commands]


def test_every_command_understands_what_the_demo_gives_it() -> None:
    assert [name for name, _ in parsed_script()] == ["badam-plan", "badam-plan", "badam-train", "badam-report"]


def test_each_command_reads_what_one_before_it_has_written() -> None:
    _, small, train, report = (options for _, options in parsed_script())
    assert train["plan"] == small["output"] == report["plan"]
    assert report["measured"] == [train["output_dir"] / "measured.json"]


def test_the_run_is_long_enough_for_every_block() -> None:
    _, small, train, _ = (options for _, options in parsed_script())
    blocks = 8 + small["include_embedding"] + small["include_lm_head"]
    schedule = BlockSchedule(small["switch_mode"], int(small["switch_every"]), blocks, small["seed"])
    assert {schedule.block_at_step(step) for step in range(train["max_steps"])} == set(range(blocks))


def test_a_command_that_fails_ends_the_demo_with_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def refuse(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        return subprocess.CompletedProcess(command, 2 if "badam_cli.train" in command else 0)

    monkeypatch.setattr(demo.subprocess, "run", refuse)
    monkeypatch.setattr(demo.sys, "argv", ["demo", str(tmp_path / "demo")])
    with pytest.raises(SystemExit) as caught:
        demo.main()
    assert caught.value.code == 2
    assert len(ran) == 3
    assert "$ badam-plan meta-llama/Llama-2-7b-hf --gpu rtx3090" in capsys.readouterr().out

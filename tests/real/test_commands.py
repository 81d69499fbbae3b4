"""From a directory with weights and a data file through all commands: plan, train, resume, report, from_pretrained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.badam.training.tiny import CONFIG
from tests.real.conversations import tokenizer_of
from tests.real.data_files import CASES, Case

CHOSEN = (
    "messages-with-tool-calls.jsonl",
    "messages-some-of-which-are-refused.jsonl",
    "messages-with-a-system-role-that-is-refused.jsonl",
)


def command(name: str, *arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"badam_cli.{name}", *arguments], cwd=directory, capture_output=True, text=True
    )


def flags(case: Case) -> list[str]:
    return [word for name, value in case.options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOSEN)
def test_data_goes_through_all_commands_or_ends_in_its_sentence(name: str, tmp_path: Path) -> None:
    (case,) = [case for case in CASES if case.name == name]
    model = tmp_path / "model"
    made = tokenizer_of(str(case.template))
    made.save_pretrained(model)
    facts = {key: value for key, value in CONFIG.items() if key != "model_type"}
    config = LlamaConfig(**{**facts, "vocab_size": len(made), "max_position_embeddings": 512})
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
    (tmp_path / name).write_bytes(case.content)

    planned = command(
        "plan",
        "model",
        "--gpu",
        "cpu",
        "--batch-size",
        "2",
        "--seq-len",
        "512",
        "--switch-every",
        "1",
        "--output",
        "plan.json",
        directory=tmp_path,
    )
    assert planned.returncode == 0, planned.stderr
    training = [
        "--plan",
        "plan.json",
        "--data",
        name,
        "--output-dir",
        "run",
        "--save-steps",
        "2",
        "--pad-to",
        "plan",
        *flags(case),
    ]
    trained = command("train", *training, "--max-steps", "2", directory=tmp_path)
    if case.says is not None:
        assert trained.returncode == 2
        assert case.says.replace("{path}", name) in trained.stderr
        assert not (tmp_path / "run").exists()
        return
    assert trained.returncode == 0, trained.stderr
    for note in case.notes:
        assert note.replace("{path}", name) in trained.stderr
    resumed = command("train", *training, "--max-steps", "8", "--resume", directory=tmp_path)  # each block twice
    assert resumed.returncode == 0, resumed.stderr
    report = command("report", "plan.json", "run/measured.json", "--json", directory=tmp_path)
    assert report.returncode == 0, report.stdout
    assert json.loads(report.stdout)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert AutoTokenizer.from_pretrained(tmp_path / "run/model").chat_template == made.chat_template

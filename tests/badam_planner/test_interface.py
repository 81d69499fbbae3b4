"""Planning from Python is planning by the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import badam_planner
from badam.errors import DoesNotFit, InputError
from badam.files import CACHE_DIRECTORY

FACTS = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 16,
         "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}  # fmt: skip


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_DIRECTORY, str(tmp_path / "cache"))
    (tmp_path / "config.json").write_text(json.dumps(FACTS))
    return tmp_path


def test_a_plan_from_python_is_the_commands_plan(directory: Path) -> None:
    planned = badam_planner.plan(str(directory), gpu="rtx3090", batch_size=2, seq_len=32)
    command = [sys.executable, "-m", "badam_cli.plan", str(directory), "--gpu", "rtx3090", "--batch-size", "2"]
    subprocess.run([*command, "--seq-len", "32", "--output", str(directory / "plan.json")], check=True)
    written = badam_planner.load_plan(directory / "plan.json")
    assert planned.model_copy(update={"provenance": written.provenance}) == written


def test_a_configuration_and_a_model_are_planned_like_their_file(directory: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        **{name: value for name, value in FACTS.items() if name not in ("model_type", "architectures")}
    )
    known = badam_planner.plan(str(directory), gpu="rtx3090", seq_len=32).prediction
    planned = badam_planner.plan(config, gpu="rtx3090", seq_len=32)
    assert planned.prediction is not None
    assert known is not None
    assert planned.prediction.peak_allocated_bytes == known.peak_allocated_bytes
    classifier = badam_planner.plan(LlamaForSequenceClassification(config), gpu="rtx3090", seq_len=32)
    assert classifier.model.task == "sequence-classification"


def test_what_does_not_fit_is_raised_with_what_would(directory: Path) -> None:
    with pytest.raises(DoesNotFit, match="too much"):
        badam_planner.plan(str(directory), gpu="rtx3090", gpu_memory_bytes=322 * 2**20)


def test_a_wrong_option_is_refused_in_a_sentence(directory: Path) -> None:
    with pytest.raises(InputError, match=r"--batch-size: .*found 0"):
        badam_planner.plan(str(directory), gpu="rtx3090", batch_size=0)


def test_sizes_around_a_plan_are_those_that_fit(directory: Path) -> None:
    planned = badam_planner.plan(str(directory), gpu="rtx3090", batch_size=2, seq_len=32, partition="layer")
    found = badam_planner.sizes(planned)
    assert {(cell.batch_size, cell.seq_len) for cell in found.cells} >= {(2, 32), (4, 64)}
    assert all(cell.fits for cell in found.cells)

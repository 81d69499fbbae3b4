"""Configurations of real models as their checkpoints have them: each is planned, or refused in the sentence it should.

``configurations.json`` holds facts of 49 models with the page that each is published on. That they are right shows in
``parameters``, which for checkpoints with safetensors is the number that their page gives; where it is not, a note says
why. ``ends`` is how badam-plan ends: ``plans``, ``does not fit``, ``refused`` with what ``says`` says, or ``says``: it
plans or refuses, and prints that.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from badam.errors import InputError
from badam.training.build import model_config
from badam_planner.search.model_spec import describe_model

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "configurations.json").read_text(encoding="utf-8"))
FIXED_LENGTH = ("vit", "whisper")  # their inputs have one length
PLANNED = [pytest.param(case, id=case["model"]) for case in CASES if case["ends"] != "refused"]
REFUSED = [pytest.param(case, id=case["model"]) for case in CASES if case["ends"] == "refused"]


def written(case: dict[str, Any], directory: Path) -> str:
    path = directory / "config.json"
    path.write_text(json.dumps(case["facts"]), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("case", PLANNED)
def test_the_parameters_and_the_vocabulary_of_a_published_model_are_found(case: dict[str, Any], tmp_path: Path) -> None:
    spec = describe_model(written(case, tmp_path))
    assert spec.parameters == case["parameters"]
    if case["facts"]["model_type"] != "vit":
        text = case["facts"].get("text_config", {})
        said = case["facts"].get("vocab_size", text.get("vocab_size", 262_208))  # Gemma-3-4B leaves it to the class
        assert model_config(spec).get_text_config().vocab_size == said


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_cannot_be_planned_is_refused_with_the_reason(case: dict[str, Any], tmp_path: Path) -> None:
    if all(find_spec(module) for module in case.get("without", ("no_such_module",))):
        pytest.skip(f"{', '.join(case['without'])} are installed, without which this model is refused")
    with pytest.raises(InputError, match=case["says"]) as caught:
        describe_model(written(case, tmp_path))
    assert case["never"] not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize("case", [*PLANNED, *REFUSED])
def test_the_command_ends_as_it_is_written_down(case: dict[str, Any], tmp_path: Path) -> None:
    length = () if case["facts"]["model_type"] in FIXED_LENGTH else ("--seq-len", "512")
    command = [sys.executable, "-m", "badam_cli.plan", written(case, tmp_path), "--gpu", "h200", "--batch-size", "1"]
    result = subprocess.run([*command, *length], capture_output=True, text=True, cwd=tmp_path)
    printed = result.stdout + result.stderr
    assert "Traceback" not in printed
    expected = {"plans": (0,), "does not fit": (1,), "says": (0, 1, 2), "refused": (2,)}[case["ends"]]
    assert result.returncode in expected, printed
    if "says" in case:
        assert re.search(case["says"], " ".join(printed.split())), printed


def test_forty_models_are_kept_with_the_page_they_are_published_on() -> None:
    assert len({case["model"] for case in CASES}) == len(CASES) >= 40
    assert all(case["source"].startswith("https://huggingface.co/") for case in CASES)

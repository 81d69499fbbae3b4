"""Answers are found again, whole, and only for the same question."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from badam.errors import DoesNotFit
from badam.files import CACHE_DIRECTORY
from badam.plan import MethodOptions, Target
from badam.vocabulary import Category, Phase
from badam_planner.search import answers
from badam_planner.search.question import Question
from badam_planner.search.result import Answer, Candidate, SearchResult
from tests.badam_planner import factories

CANDIDATE = Candidate(
    strategy="layer", num_blocks=2, largest_block_parameters=3, checkpointing="all", loss="full", formula_bytes=4,
    peak_allocated_bytes=5, peak_reserved_bytes=6, peak_device_bytes=7, peak_phase=Phase.BACKWARD, peak_module="m",
    peak_block="b", headroom_bytes=-8, backward_relative=0.25, by_category={Category.PARAMETER: 5},
    by_phase={Phase.STEP: 5}, fits=True, recommended=True,
)  # fmt: skip
RESULT = SearchResult("model", "card", 9, 1, 2, (CANDIDATE,))
QUESTION = Question(model="id")
SOURCE = ("id", "catalogue", {"hidden_size": 8})
TARGET = Target(gpu="rtx3090", total_bytes=24, usable_bytes=23)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_DIRECTORY, str(tmp_path / "cache"))
    return tmp_path / "cache" / "answers"


def test_a_plan_and_its_table_come_back_as_they_were() -> None:
    answer = Answer(RESULT, factories.plan(), None)
    answers.save_answer("key", answer)
    assert answers.load_answer("key") == answer


def test_a_refusal_comes_back_with_its_advice() -> None:
    answers.save_answer("key", Answer(RESULT, None, DoesNotFit("too much", advice="less")))
    found = answers.load_answer("key")
    assert found is not None
    assert found.plan is None
    assert found.refusal is not None
    assert (found.refusal.message, found.refusal.advice) == ("too much", "less")


def test_what_was_never_answered_is_not_found() -> None:
    assert answers.load_answer("key") is None


@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda _: "", lambda _: '{"plan": 3}'])
def test_a_damaged_file_counts_as_none_and_is_replaced(own_cache: Path, damage: object) -> None:
    answer = Answer(RESULT, factories.plan(), None)
    answers.save_answer("key", answer)
    file = own_cache / "key.json"
    file.write_text(damage(file.read_text()))  # type: ignore[operator]
    assert answers.load_answer("key") is None
    answers.save_answer("key", answer)
    assert answers.load_answer("key") == answer


def test_every_part_of_the_question_and_every_version_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(question: Question = QUESTION, source: Any = SOURCE, target: Target = TARGET) -> str:
        return answers.answer_key(question, source, target)

    keys = {key(), key(replace(QUESTION, batch_size=2)), key(replace(QUESTION, options=MethodOptions(rank=4)))}
    keys.add(key(source=("id", "catalogue", {"hidden_size": 9})))
    keys.add(key(target=TARGET.model_copy(update={"usable_bytes": 22})))
    monkeypatch.setattr(answers, "version", lambda name: "0.0")
    keys.add(key())
    monkeypatch.setattr(answers, "_sources_digest", lambda: "other sources")
    keys.add(key())
    assert len(keys) == 7
    assert key() in keys


def test_writers_at_the_same_time_leave_one_whole_answer(own_cache: Path) -> None:
    answer = Answer(RESULT, factories.plan(), None)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: answers.save_answer("key", answer), range(40)))
    assert answers.load_answer("key") == answer
    assert [file.name for file in own_cache.iterdir()] == ["key.json"]


def test_a_cache_that_cannot_be_written_is_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv(CACHE_DIRECTORY, str(tmp_path / "file"))
    answers.save_answer("key", Answer(RESULT, None, None))
    assert answers.load_answer("key") is None


def test_the_oldest_answers_make_room(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "KEPT_ANSWERS", 2)
    for key in ("one", "two", "three"):
        answers.save_answer(key, Answer(RESULT, None, None))
    assert len(list(own_cache.iterdir())) == 2
    assert answers.load_answer("three") is not None


def test_an_answer_from_the_cache_loads_no_torch(tmp_path: Path, own_cache: Path) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 16,
              "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    script = (
        "import sys\nfrom badam_cli.plan import app\n"
        f"arguments = [{str(tmp_path)!r}, '--gpu', 'rtx3090', '--json']\n"
        "try:\n    app(arguments, standalone_mode=False)\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(sorted(name for name in ('torch', 'transformers') if name in sys.modules), file=sys.stderr)\n"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True) for _ in range(2)
    )
    assert first.stderr.splitlines()[-1] == "['torch', 'transformers']"
    assert second.stderr.splitlines()[-1] == "[]"
    plans = [json.loads(one.stdout) for one in (first, second)]
    for plan in plans:
        del plan["provenance"]["date"]
    assert plans[0] == plans[1]

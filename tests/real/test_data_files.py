"""Data files as people have them: what is learned of each and what is said of it, or the sentence that refuses it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from badam.errors import BadamError
from badam.training.data.inputs import load_inputs
from badam.training.options import RunOptions
from tests.badam.training.tiny import CONFIG, run_tiny, tiny_plan
from tests.real.conversations import marked, tokenizer_of
from tests.real.data_files import CASES, Case

LENGTH = 512
PLAN = tiny_plan(
    model={"config": {**CONFIG, "max_position_embeddings": LENGTH}}, training={"seq_len": LENGTH, "batch_size": 2}
)
CASES_BY_NAME = [pytest.param(case, id=case.name) for case in CASES]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories with a tokenizer for each template of the cases; ``base`` has none."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name in {case.template for case in CASES}:
        made = tokenizer_of(name or "plain")
        if name is None:
            made.chat_template = None
        made.save_pretrained(root / (name or "base"))
    return root


def written(case: Case, directory: Path) -> Path:
    path = directory / case.name
    path.write_bytes(case.content)
    return path


def pattern(text: str, path: Path) -> str:
    return text.replace("{path}", re.escape(str(path)))


@pytest.mark.parametrize("case", CASES_BY_NAME)
def test_a_file_ends_as_it_is_written_down(case: Case, tokenizers: Path, tmp_path: Path) -> None:
    path = written(case, tmp_path)
    options = RunOptions(output_dir=tmp_path / "run", data=str(path), **case.options)
    if case.says is not None:
        with pytest.raises(BadamError, match=pattern(case.says, path)) as caught:
            load_inputs(PLAN, options, str(tokenizers / (case.template or "base")))
        assert caught.value.exit_code == 2
        return
    inputs = load_inputs(PLAN, options, str(tokenizers / (case.template or "base")))
    assert len(inputs.training.dataset) == case.records
    assert tuple(marked(inputs.training.dataset[0], inputs.tokenizer)) == case.learned
    said = [note for note in inputs.training.notes if "found by comparing" not in note]
    for wanted in case.notes:
        assert any(wanted.replace("{path}", str(path)) in note for note in said), said
    assert len(said) == len(case.notes), said


@pytest.mark.parametrize("case", [param for param in CASES_BY_NAME if "tool-calls.jsonl" in str(param.id)])
def test_a_run_says_of_its_data_what_is_not_used(case: Case, tokenizers: Path, tmp_path: Path) -> None:
    plan = tiny_plan(
        model={
            "source": "directory",
            "id": str(tokenizers / str(case.template)),
            "config": {**CONFIG, "max_position_embeddings": LENGTH},
        },
        training={"seq_len": LENGTH},
    )
    result, printed = run_tiny(
        plan, tmp_path, data=str(written(case, tmp_path)), init="random", max_steps=2, padding="longest", **case.options
    )
    assert result.step == 2
    for wanted in case.notes:
        assert wanted.replace("{path}", str(tmp_path / case.name)) in printed


def test_data_is_refused_before_a_model_is_made(
    tokenizers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = [case for case in CASES if case.name == "messages-with-a-system-role-that-is-refused.jsonl"]
    monkeypatch.setattr("badam.training.run._model", lambda *_, **__: pytest.fail("a model was made"))
    plan = tiny_plan(model={"source": "directory", "id": str(tokenizers / "no_system")})
    with pytest.raises(BadamError, match="System role not supported"):
        run_tiny(plan, tmp_path, data=str(written(case, tmp_path)), init="random")


def test_a_key_is_not_asked_for_where_the_file_is_a_list(tokenizers: Path, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('[{"prompt": "a", "completion": "b"}]')
    options = RunOptions(output_dir=tmp_path, data=str(tmp_path / "list.json"), records="train")
    with pytest.raises(BadamError, match=r"is a list of records, not an object with one"):
        load_inputs(PLAN, options, str(tokenizers / "plain"))


def test_padding_is_a_token_that_the_model_has_even_if_the_tokenizer_has_one_of_its_own(
    tokenizers: Path, tmp_path: Path
) -> None:
    from badam.training.data.tokenizer import load_tokenizer

    made = load_tokenizer(str(tokenizers / "base"))
    made.add_special_tokens({"pad_token": "<|padding|>"})
    made.save_pretrained(tmp_path / "more")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    plan = tiny_plan(model={"config": {**CONFIG, "vocab_size": made.pad_token_id}})
    options = RunOptions(output_dir=tmp_path, data=str(tmp_path / "pairs.jsonl"))
    inputs = load_inputs(plan, options, str(tmp_path / "more"))
    assert inputs.tokenizer.pad_token_id == inputs.vocabulary_size
    assert inputs.pad_token_id == inputs.tokenizer.eos_token_id


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES_BY_NAME)
def test_a_file_is_trained_on_resumed_and_reported_or_refused_before_a_directory_is_left(
    case: Case, tokenizers: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from badam.training.data.tokenizer import load_tokenizer

    plan = tiny_plan(
        model={
            "source": "directory",
            "id": str(tokenizers / (case.template or "base")),
            "config": {**CONFIG, "max_position_embeddings": LENGTH},
        },
        training={"seq_len": LENGTH},
    )
    path = written(case, tmp_path)
    settings = {"data": str(path), "init": "random", "save_steps": 2, "padding": "longest", **case.options}
    if case.says is not None:
        with pytest.raises(BadamError, match=pattern(case.says, path)):
            run_tiny(plan, tmp_path, max_steps=2, **settings)
        assert not (tmp_path / "run").exists()
        return
    result, _ = run_tiny(plan, tmp_path, max_steps=2, **settings)
    assert result.step == 2
    resumed, _ = run_tiny(plan, tmp_path, max_steps=4, resume=True, **settings)
    assert resumed.step == 4
    assert resumed.model_path is not None
    AutoModelForCausalLM.from_pretrained(resumed.model_path)
    load_tokenizer(str(resumed.model_path))


def test_thirty_files_are_kept() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 30
    assert sum(len(case.content) for case in CASES) < 100_000

"""Reading training data: every format and file, and a sentence with line, byte or columns for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from badam.errors import DataError, InputError
from badam.training.data import dataset as data_module
from badam.training.data.dataset import load_data, to_dataset
from badam.training.data.formats import detect

ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
PAIR = {"prompt": "1 + 2 = ", "completion": "3"}
MESSAGES = {"messages": [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "1 + 2?"}, {"from": "gpt", "value": "3"}]}
TEXT = {"text": "One and two are three."}


def rows_of(path: Path, **options: Any) -> list[dict[str, Any]]:
    return [record for record, _ in load_data(str(path), **{"chat": False, **options}).records()]


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "kind", "expected"),
    [
        (PAIR, "prompt-completion", PAIR),
        (MESSAGES, "messages", MESSAGES),
        (SHAREGPT, "messages", MESSAGES),
        (TEXT, "text", TEXT),
        (
            ALPACA,
            "prompt-completion",
            {"prompt": "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n", "completion": "3"},
        ),
        (
            {**ALPACA, "input": ""},
            "prompt-completion",
            {"prompt": "### Instruction:\nAdd.\n\n### Response:\n", "completion": "3"},
        ),
    ],
    ids=["pair", "messages", "sharegpt", "text", "alpaca", "alpaca-without-input"],
)
def test_every_format_becomes_what_trl_takes(tmp_path: Path, row: Any, kind: str, expected: Any) -> None:
    data = load_data(str(jsonl(tmp_path / "data.jsonl", row)), chat=False)
    assert data.kind == kind
    assert [record for record, _ in data.records()] == [expected]


@pytest.mark.parametrize(("row", "question"), [(ALPACA, "Add.\n\n1 and 2"), (PAIR, "1 + 2 = ")], ids=["alpaca", "pair"])
def test_with_a_chat_template_prompts_become_messages(tmp_path: Path, row: Any, question: str) -> None:
    (found,) = rows_of(jsonl(tmp_path / "data.jsonl", row), chat=True)
    assert found["prompt"] == [{"role": "user", "content": question}]
    assert found["completion"] == [{"role": "assistant", "content": "3"}]


def write_csv(path: Path) -> None:
    path.write_text('prompt,completion\n"1 + 2 = ",3\n', encoding="utf-8")


WRITERS = {
    "data.jsonl": lambda path: jsonl(path, PAIR),
    "lines.json": lambda path: jsonl(path, PAIR),
    "array.json": lambda path: path.write_text(json.dumps([PAIR], indent=2), encoding="utf-8"),
    "data.csv": write_csv,
    "data.tsv": lambda path: path.write_text("prompt\tcompletion\n1 + 2 = \t3\n", encoding="utf-8"),
    "data.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist([PAIR]), path),
    "with-mark.jsonl": lambda path: path.write_text("\ufeff" + json.dumps(PAIR), encoding="utf-8"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_is_read(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert rows_of(tmp_path / name) == [PAIR]


def test_a_directory_is_all_its_data_files(tmp_path: Path) -> None:
    jsonl(tmp_path / "b.jsonl", {**PAIR, "completion": "second"})
    jsonl(tmp_path / "a.jsonl", {**PAIR, "completion": "first"})
    (tmp_path / "readme.md").write_text("no data")
    assert [row["completion"] for row in rows_of(tmp_path)] == ["first", "second"]


def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    dataset = to_dataset([PAIR])
    assert dataset is not None
    dataset.save_to_disk(tmp_path / "saved")
    assert rows_of(tmp_path / "saved") == [PAIR]


def test_text_files_are_passages_between_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("First\npassage.\n\n\nSecond.\n", encoding="utf-8")
    assert [row["text"] for row in rows_of(tmp_path / "data.txt")] == ["First\npassage.", "Second."]


def test_other_column_names_can_be_given(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "data.jsonl", {"question": "1 + 2 = ", "answer": "3"})
    assert rows_of(path, columns={"prompt": "question", "completion": "answer"}) == [PAIR]


def test_records_with_nothing_to_learn_are_counted_not_trained_on(tmp_path: Path) -> None:
    silent = {"messages": [{"role": "user", "content": "hello?"}]}
    data = load_data(str(jsonl(tmp_path / "data.jsonl", MESSAGES, silent)), chat=False)
    assert len(data.dataset) == 1
    assert data.skipped == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "is empty"),
        ("blank.jsonl", b"\n\n", "has no records"),
        ("array.json", b"[]", "has no records"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "not JSON: Expecting value at line 2, column"),
        ("cut.json", b'[{"text": "a"},\n {"te', "not JSON: .* at line 2, column"),
        ("list.jsonl", b'["a"]\n', r"line 1: a record must be an object with named fields, found list"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "not UTF-8 text: byte 27 is 0xe9"),
        ("columns.jsonl", b'{"question": "a", "reply": "b"}\n', "has the columns question, reply"),
        (
            "missing.jsonl",
            b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n',
            "line 2: the record lacks completion",
        ),
        ("number.jsonl", b'{"prompt": "a", "completion": 3}\n', "line 1: completion is 3, not text"),
        (
            "role.jsonl",
            b'{"messages": [{"role": "robot", "content": "a"}]}\n',
            "message 1 in messages has the role 'robot'",
        ),
        ("turns.jsonl", b'{"conversations": "hi"}\n', "conversations is 'hi', not a list"),
        ("ragged.csv", b"prompt,completion\na,b,c\n", "line 2: the row has another number of fields"),
        ("fake.parquet", b"not parquet", "not a parquet file"),
        ("silent.jsonl", b'{"prompt": "a", "completion": " "}\n', "None of the 1 records"),
        ("data.xlsx", b"x", "ending .xlsx, which is not known"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        rows_of(tmp_path / name)
    assert caught.value.exit_code == 2


def test_missing_columns_are_told_with_those_that_would_do(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        rows_of(jsonl(tmp_path / "data.jsonl", {"question": "a"}))
    for wanted in ("messages", "conversations", "prompt + completion", "instruction + output", "text", "--column"):
        assert wanted in str(caught.value)


def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no file"):
        rows_of(tmp_path / "absent.jsonl")


def test_a_name_that_the_hub_does_not_give_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match="no route to host"):
        load_data("acme/instructions", chat=False)


def test_a_data_set_of_the_hub_is_read_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or [ALPACA])
    data = load_data("acme/instructions", chat=False, split="test")
    assert asked == [("acme/instructions", "test")]
    assert len(data.dataset) == 1


@given(st.sets(st.sampled_from(["text", "prompt", "completion", "messages", "instruction", "output", "input", "id"])))
def test_a_format_is_detected_exactly_when_its_columns_are_there(columns: set[str]) -> None:
    complete = [
        needed
        for needed in ({"messages"}, {"prompt", "completion"}, {"instruction", "output"}, {"text"})
        if needed <= columns
    ]
    if complete:
        assert set(detect(columns, source="x").needed) == complete[0]
    else:
        with pytest.raises(DataError):
            detect(columns, source="x")


def test_large_data_lies_in_files_of_the_given_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "CHUNK_ROWS", 4)
    path = jsonl(tmp_path / "data.jsonl", *({**PAIR, "completion": str(number)} for number in range(10)))
    data = load_data(str(path), chat=False, directory=tmp_path / "kept")
    assert [record["completion"] for record, _ in data.records()] == [str(number) for number in range(10)]
    derived = data.dataset.map(lambda row: {"length": len(row["record"])})  # what is made of it lies there as well
    assert {Path(file["filename"]).parent for file in derived.cache_files} == {tmp_path / "kept"}


def test_data_of_one_chunk_stays_in_memory(tmp_path: Path) -> None:
    loaded = load_data(str(jsonl(tmp_path / "data.jsonl", PAIR)), chat=False, directory=tmp_path / "kept").dataset
    assert loaded.cache_files == []
    assert not (tmp_path / "kept").exists()


def test_a_disk_that_refuses_the_data_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "CHUNK_ROWS", 1)
    (tmp_path / "kept").touch()  # no directory can be made there
    with pytest.raises(InputError, match=r"could not be prepared in .*kept: File exists"):
        load_data(str(jsonl(tmp_path / "data.jsonl", PAIR, PAIR)), chat=False, directory=tmp_path / "kept")

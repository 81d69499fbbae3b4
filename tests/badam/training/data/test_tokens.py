"""Tokens and labels of records: TRL's where it has some, and what each choice of --loss-on learns."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import qwen3_chat_template

from badam.errors import DataError, InputError
from badam.training.data.bad_rows import BadRows
from badam.training.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from badam.training.data.tokens import Labeller
from tests.real.conversations import assistant, marked, user

PLACE = "data.jsonl, line 7"
PAIR = {"prompt": "1 + 2 = ", "completion": "3"}
CHAT = {"messages": [user("one"), assistant("two"), user("three"), assistant("four")]}


def tokenizer(template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerBase:
    made = train_tokenizer(["one two three four"] * 3, 300)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    return made


def labelled(record: dict[str, Any], made: PreTrainedTokenizerBase, **options: Any) -> dict[str, list[int]]:
    settings: dict[str, Any] = {"loss_on": None, "rows": 400, "bad": BadRows(), **options}
    (found,) = Labeller(made, **settings)([(record, PLACE)])
    return found


def of_trl(record: dict[str, Any], made: PreTrainedTokenizerBase, directory: Path, **options: Any) -> dict[str, Any]:
    """What TRL's trainer makes of the record."""
    from trl.chat_template_utils import get_training_chat_template

    assistant_only = options.get("assistant_only_loss", False)
    itself = SimpleNamespace(
        _tokenizer=made,
        chat_template=get_training_chat_template(made) if assistant_only else None,
        completion_only_loss="prompt" in record,
    )
    arguments = SFTConfig(output_dir=str(directory), max_length=None, use_cpu=True, bf16=False, **options)
    (found,) = SFTTrainer._prepare_dataset(itself, Dataset.from_list([record]), made, arguments, False, None, "train")
    return {"input_ids": found["input_ids"], "labels": found["labels"]}


@pytest.mark.parametrize(
    ("record", "options"),
    [
        (PAIR, {}),
        ({"prompt": "one tw", "completion": "o three"}, {}),
        ({"text": "one two three"}, {}),
        ({"prompt": [user("one")], "completion": [assistant("two")]}, {}),
        (CHAT, {"assistant_only_loss": True}),
    ],
    ids=["pair", "tokens-across-the-border", "text", "messages-of-a-pair", "conversation"],
)
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, qwen3_chat_template], ids=["ours", "qwen3"])
def test_tokens_and_labels_are_those_of_trl(
    tmp_path: Path, record: dict[str, Any], options: dict[str, Any], template: str
) -> None:
    made = tokenizer(template)
    assert labelled(record, made) == of_trl(record, made, tmp_path, **options)


@given(st.text(min_size=1, max_size=30), st.text(min_size=1, max_size=30))
def test_every_character_of_a_completion_and_none_but_of_its_first_token_before_it_is_learned(
    prompt: str, completion: str
) -> None:
    found = labelled({"prompt": prompt, "completion": completion}, SMALL)
    learned = [label for label in found["labels"] if label != -100]
    assert found["input_ids"][-len(learned) :] == learned
    text = SMALL.decode(learned)
    assert text.endswith(completion + SMALL.eos_token)
    assert SMALL.decode(found["input_ids"]) == prompt + completion + SMALL.eos_token


SMALL = tokenizer()


@pytest.mark.parametrize(
    ("loss_on", "learned"),
    [
        (None, ["two<|end|>", "four<|end|>"]),
        ("assistant", ["two<|end|>", "four<|end|>"]),
        ("completion", ["four<|end|>"]),
    ],
)
def test_what_is_learned_of_a_conversation_can_be_chosen(loss_on: Any, learned: list[str]) -> None:
    assert marked(labelled(CHAT, SMALL, loss_on=loss_on), SMALL) == learned


def test_all_of_a_conversation_can_be_learned() -> None:
    found = labelled(CHAT, SMALL, loss_on="all")
    assert found["labels"] == found["input_ids"]


def test_what_has_no_weight_is_not_learned_whatever_is_chosen() -> None:
    record = {"messages": [user("one"), assistant("two", weight=0), user("three"), assistant("four")]}
    assert marked(labelled(record, SMALL), SMALL) == ["four<|end|>"]
    everything = labelled(record, SMALL, loss_on="all")
    assert "two" not in "".join(marked(everything, SMALL))
    assert "three" in "".join(marked(everything, SMALL))


def test_the_assistants_earlier_turns_in_a_prompt_are_learned_when_asked_for() -> None:
    record = {"prompt": CHAT["messages"][:3], "completion": CHAT["messages"][3:]}
    assert marked(labelled(record, SMALL, loss_on="assistant"), SMALL) == ["two<|end|>", "four<|end|>"]
    (answer,) = marked(labelled(record, SMALL), SMALL)
    assert answer.startswith("four<|end|>")


@pytest.mark.parametrize(
    ("record", "loss_on", "message"),
    [
        (
            {"text": "one"},
            "assistant",
            "--loss-on assistant needs conversations or prompts; data.jsonl, line 7 is plain",
        ),
        ({"text": "one"}, "completion", "--loss-on completion needs"),
        (PAIR, "assistant", "needs conversations; data.jsonl, line 7 is a prompt with its completion"),
    ],
)
def test_a_choice_that_the_data_does_not_have_is_refused(record: Any, loss_on: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        labelled(record, SMALL, loss_on=loss_on)


def test_a_token_beyond_the_models_vocabulary_is_told_with_its_place() -> None:
    made = tokenizer()
    beyond = made.convert_tokens_to_ids("<|im_end|>")
    assert labelled(PAIR, made, rows=beyond)["input_ids"]
    with pytest.raises(
        DataError, match=rf"{PLACE}: the token '<\|im_end\|>' has the id {beyond}, .* ends with {beyond - 1}"
    ):
        labelled({"text": "one<|im_end|>"}, made, rows=beyond)


def test_records_that_cannot_be_trained_on_are_left_out_and_counted_when_asked() -> None:
    bad = BadRows("skip")
    label = Labeller(SMALL, loss_on=None, rows=30, bad=bad)
    assert list(label([(PAIR, PLACE), (PAIR, "elsewhere")])) == []
    assert bad.sentence is not None
    assert bad.sentence.startswith(
        "2 records were left out with --on-bad-row skip; the first: data.jsonl, line 7: the token"
    )


def test_a_tokenizer_that_tells_no_offsets_finds_the_same_labels() -> None:
    made = tokenizer()

    class Slow:
        is_fast = False

        def __getattr__(self, name: str) -> Any:
            return getattr(made, name)

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return made(*arguments, **options)

    for record in (PAIR, {"text": "one two"}, CHAT):
        assert labelled(record, Slow()) == labelled(record, made)  # type: ignore[arg-type]


def test_a_record_with_nothing_to_learn_is_counted_not_trained_on() -> None:
    label = Labeller(SMALL, loss_on="completion", rows=400, bad=BadRows())
    record = {"messages": [user("one"), assistant("two"), user("three"), assistant("four", weight=0)]}
    assert list(label([(record, PLACE)])) == []
    assert label.empty == 1

"""Chat templates that behave as those of real models do: what is learned through each, and what each refuses or omits.

The templates are written for this corpus after what the real ones do: Gemma's (no system role), Llama-2's and
Mistral's (turns alternate, the system message at the front or at the last question), Qwen3's (thoughts only after the
last question), DeepSeek's (thoughts cut out, arguments of calls as text), Llama-3.1's (one call in a turn), SmolVLM's
(content in parts), and others that pass over what they do not know.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl

from badam.errors import DataError, InputError
from badam.training.data.bad_rows import BadRows
from badam.training.data.chat import ChatTemplate, Conversation
from badam.training.data.tokens import Labeller
from tests.real.conversations import STOPS, TEMPLATES, assistant, calling, marked, system, tokenizer_of, tool, user

PLACE = "data.jsonl, line 3"

ONE = [user("q1"), assistant("a1")]
SYSTEM = [system("sys"), user("q1"), assistant("a1"), user("q2"), assistant("a2")]
TWO_QUESTIONS = [user("q1"), user("q2"), assistant("a2")]
THOUGHTS = [
    user("q1"),
    assistant("a1", reasoning_content="r1"),
    user("q2"),
    assistant("a2", reasoning_content="r2"),
]
INLINE = [user("q1"), assistant("<think>r1</think>a1"), user("q2"), assistant("<think>r2</think>a2")]
TOOLS = [user("q1"), calling(a=1, b=2), tool("3"), assistant("a2")]
WEIGHTS = [user("q1"), assistant("a1", weight=0), user("q2"), assistant("a2", weight=1)]
OPENING = [assistant("hello"), user("q1"), assistant("a1")]
NAMED = [user("q1", name="Bob"), assistant("a1")]
CONVERSATIONS = {
    "one": ONE,
    "system": SYSTEM,
    "two questions": TWO_QUESTIONS,
    "thoughts": THOUGHTS,
    "inline thoughts": INLINE,
    "tools": TOOLS,
    "weights": WEIGHTS,
    "opening": OPENING,
    "named": NAMED,
}
ALTERNATE = "Conversation roles must alternate"

LEARNED: dict[str, dict[str, list[str] | str]] = {
    "plain": {
        "one": ["a1<|im_end|>"],
        "system": ["a1<|im_end|>", "a2<|im_end|>"],
        "two questions": ["a2<|im_end|>"],
        "inline thoughts": ["<think>r1</think>a1<|im_end|>", "<think>r2</think>a2<|im_end|>"],
        "tools": ["a2<|im_end|>"],
        "weights": ["a2<|im_end|>"],
        "opening": ["hello<|im_end|>", "a1<|im_end|>"],
    },
    "marked": {
        "system": ["a1<|im_end|>", "a2<|im_end|>"],
        "tools": ["a2<|im_end|>"],
        "weights": ["a2<|im_end|>"],
    },
    "no_system": {
        "one": ["a1<end_of_turn>"],
        "system": "System role not supported",
        "two questions": ALTERNATE,
        "thoughts": ["a1<end_of_turn>", "a2<end_of_turn>"],
        "tools": ALTERNATE,
        "opening": ["a1<end_of_turn>"],
    },
    "instructions": {
        "one": ["a1 <|end|>"],
        "system": ["a1 <|end|>", "a2 <|end|>"],
        "two questions": ALTERNATE,
        "weights": ["a2 <|end|>"],
        "opening": ["a1 <|end|>"],
    },
    "system_last": {
        "one": ["a1<|end|>"],
        "system": ["a1<|end|>", "a2<|end|>"],
        "tools": "Only user, system and assistant roles are supported",
        "weights": ["a2<|end|>"],
    },
    "thinks_last": {
        "one": ["<think>\n\n</think>\n\na1<|im_end|>"],
        "system": ["a1<|im_end|>", "<think>\n\n</think>\n\na2<|im_end|>"],
        "thoughts": ["a1<|im_end|>", "<think>\nr2\n</think>\n\na2<|im_end|>"],
        "tools": [
            '\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>',
            "<think>\n\n</think>\n\na2<|im_end|>",
        ],
        "weights": ["<think>\n\n</think>\n\na2<|im_end|>"],
    },
    "strips_thinking": {
        "one": ["a1<|end|>"],
        "system": ["a1<|end|>", "a2<|end|>"],
        "inline thoughts": ["a1<|end|>", "a2<|end|>"],
        "tools": ["a2<|end|>"],
    },
    "one_call": {
        "one": ["a1<|eot|>"],
        "two questions": ["a2<|eot|>"],
        "tools": ['{"name": "add", "parameters": {"a": 1, "b": 2}}<|eot|>', "a2<|eot|>"],
    },
    "text_arguments": {
        "one": ["a1<|end|>"],
        "tools": ['<call>add\n{"a": 1, "b": 2}</call><|end|>', "a2<|end|>"],
    },
    "only_parts": {
        "one": [" a1<end_of_utterance>"],
        "system": [" a1<end_of_utterance>", " a2<end_of_utterance>"],
    },
    "passes_over": {
        "one": [" a1<|end|>"],
        "system": [" a1<|end|>", " a2<|end|>"],
        "tools": [" a2<|end|>"],
    },
    "known_roles": {
        "one": ["a1<|end|>"],
        "system": ["a1<|end|>", "a2<|end|>"],
        "tools": "Unexpected message role: tool",
    },
    "needs_date": {"one": "'today' is undefined"},
}
"""What is learned of each conversation, piece by piece, or what the template says when it refuses it."""

LEFT_OUT = {
    ("plain", "thoughts"): "reasoning_content of assistant messages",
    ("plain", "tools"): "tool_calls of assistant messages",
    ("marked", "tools"): "tool_calls of assistant messages",
    ("plain", "named"): "name of user messages",
    ("no_system", "opening"): "what the assistant says before the first question",
    ("thinks_last", "thoughts"): "reasoning_content of assistant messages",
    ("strips_thinking", "inline thoughts"): "part of the content of assistant messages",
    ("strips_thinking", "tools"): "the content of tool messages",
    ("passes_over", "system"): "the content of system messages",
}
"""What a template does not write of a conversation, which is said."""


def learned(template: str, record: dict[str, Any], **options: Any) -> tuple[list[str], list[str]]:
    made = tokenizer_of(template)
    label = Labeller(made, **{"loss_on": None, "rows": 10**6, "bad": BadRows(), **options})
    rows = list(label([(record, PLACE)]))
    return [piece for row in rows for piece in marked(row, made)], label.notes


@pytest.mark.parametrize(
    ("template", "conversation"), [(name, each) for name, found in LEARNED.items() for each in found]
)
def test_what_the_assistant_says_is_learned_and_nothing_else(template: str, conversation: str) -> None:
    expected = LEARNED[template][conversation]
    record = {"messages": CONVERSATIONS[conversation]}
    if isinstance(expected, list):
        assert learned(template, record)[0] == expected
    else:
        with pytest.raises(DataError, match=rf"^{PLACE}: the chat template refuses this record: {expected}") as caught:
            learned(template, record)
        assert caught.value.exit_code == 2


@pytest.mark.parametrize(("template", "conversation"), LEFT_OUT)
def test_what_a_template_does_not_write_is_said(template: str, conversation: str) -> None:
    (note,) = [
        note for note in learned(template, {"messages": CONVERSATIONS[conversation]})[1] if "not written" in note
    ]
    assert f"{LEFT_OUT[template, conversation]} (1 records)" in note


@pytest.mark.parametrize(
    ("template", "conversation"),
    [("plain", "system"), ("thinks_last", "tools"), ("one_call", "tools"), ("text_arguments", "tools")],
)
def test_nothing_is_said_of_a_conversation_that_is_written_whole(template: str, conversation: str) -> None:
    notes = learned(template, {"messages": CONVERSATIONS[conversation]})[1]
    assert not any("not written" in note or "warning" in note for note in notes)


def test_functions_stand_in_the_text_where_the_template_has_a_place_for_them() -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    assert not any("tools" in note for note in learned("thinks_last", {"messages": ONE, "tools": tools})[1])
    assert any("tools (1 records)" in note for note in learned("plain", {"messages": ONE, "tools": tools})[1])


def test_what_a_template_misses_can_be_given_in_the_record() -> None:
    record = {"messages": ONE, "chat_template_kwargs": {"today": "2026-01-01"}}
    assert learned("needs_date", record)[0] == ["a1<|end|>"]


def test_a_template_that_is_none_is_told_with_its_line() -> None:
    with pytest.raises(InputError, match=r"chat template of the tokenizer is not valid: .* in its line 3"):
        learned("broken", {"messages": ONE})


def test_two_calls_in_one_turn_are_refused_by_a_template_that_takes_one() -> None:
    twice = calling(a=1)
    twice["tool_calls"] *= 2
    with pytest.raises(DataError, match=r"This model only supports single tool-calls at once! Mend the record"):
        learned("one_call", {"messages": [user("q1"), twice]})


def test_where_turns_cannot_be_told_apart_everything_is_learned_and_that_is_said() -> None:
    made = tokenizer_of("plain")
    made.chat_template = "{% for message in messages %}{{ messages | string | length ~ message.content }}{% endfor %}"
    label = Labeller(made, loss_on=None, rows=10**6, bad=BadRows())
    (row,) = label([({"messages": ONE}, PLACE)])
    assert row["labels"] == row["input_ids"]
    assert any(f"the loss is over all of it (1 records; {PLACE}" in note for note in label.notes)
    with pytest.raises(DataError, match=f"{PLACE}: what the assistant says cannot be told from the rest"):
        list(Labeller(made, loss_on="assistant", rows=10**6, bad=BadRows())([({"messages": ONE}, PLACE)]))


def test_what_answers_begin_with_when_asked_for_and_not_here_is_said() -> None:
    records = [{"messages": ONE}, {"prompt": ONE[:1], "completion": ONE[1:]}]
    for record in records:
        pieces, notes = learned("strips_thinking", record)
        assert pieces == ["a1<|end|>"]
        assert any(r"begins its answer with '<think>\n'; the text of 1 turns here has" in note for note in notes)
        assert not any("begins its answer" in note for note in learned("plain", record)[1])


def test_of_several_templates_that_for_tools_is_taken_where_there_are_some() -> None:
    made = tokenizer_of("plain")
    made.chat_template = {"default": made.chat_template, "tool_use": tokenizer_of("thinks_last").chat_template}
    label = Labeller(made, loss_on=None, rows=10**6, bad=BadRows())
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    plain, with_tools = label([({"messages": ONE}, PLACE), ({"messages": ONE, "tools": tools}, PLACE)])
    assert marked(plain, made) == ["a1<|im_end|>"]
    assert marked(with_tools, made) == ["<think>\n\n</think>\n\na1<|im_end|>"]


TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"


@pytest.mark.parametrize("name", ["gemma", "gptoss", "llama3", "phi3", "qwen2_5", "qwen3", "qwen3_5_think", "smolvlm"])
def test_what_is_found_by_comparing_lies_within_what_trl_marks_in_templates_of_real_models(name: str) -> None:
    made = tokenizer_of("plain")
    made.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<|return|>", *STOPS]})
    made.chat_template = (TRL_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    template = ChatTemplate(made)
    conversation = Conversation([user("q1"), assistant("a1"), user("q2"), assistant("a2")])
    text = template.text(conversation, marking=True)
    by_trl: dict[int, str] = {}  # the first piece of each message: Phi-3's has the end of everything in one of its own
    for turn in template.turns(conversation, text):
        by_trl.setdefault(turn.message, text[turn.start : turn.end])
    made.chat_template += "{# another text, which TRL does not know #}"
    text = template.text(conversation)
    assert not template.marks(conversation)
    compared = [text[turn.start : turn.end] for turn in template.turns(conversation, text)]
    assert len(compared) == 2
    for found, marks, words in zip(compared, by_trl.values(), ("a1", "a2"), strict=True):
        assert words in found
        assert found.endswith((*STOPS, "<|eot_id|>", "<|return|>"))
        assert found in marks


def test_marks_in_several_pieces_are_learned_together() -> None:
    pieces = (
        "{% for message in messages %}{{ '<' + message.role + '>' }}{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content }}{% endgeneration %}{% generation %}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ message.content }}{% endif %}{% endfor %}"
    )
    made = tokenizer_of("plain")
    made.chat_template = pieces
    for loss_on, expected in ((None, ["a1<|end|>", "a2<|end|>"]), ("completion", ["a2<|end|>"])):
        label = Labeller(made, loss_on=loss_on, rows=10**6, bad=BadRows())  # type: ignore[arg-type]
        (row,) = label([({"messages": [user("q1"), assistant("a1"), user("q2"), assistant("a2")]}, PLACE)])
        assert marked(row, made) == expected
    weighed = [user("q1"), assistant("a1", weight=0), user("q2"), assistant("a2")]
    (row,) = Labeller(made, loss_on=None, rows=10**6, bad=BadRows())([({"messages": weighed}, PLACE)])
    assert marked(row, made) == ["a2<|end|>"]


def test_every_template_of_the_corpus_has_an_outcome() -> None:
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == {*LEARNED, "broken"}

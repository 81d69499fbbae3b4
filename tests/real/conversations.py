"""What tests of conversations share: messages, the tokenizer of a template, and what of a record is learned."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from badam.training.data.tokenizer import train_tokenizer

TEMPLATES = Path(__file__).parent / "templates"
STOPS = ["<|im_end|>", "<end_of_turn>", "<|eot|>", "<|end|>", "<end_of_utterance>"]


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def tool(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content}


def calling(name: str = "add", **arguments: Any) -> dict[str, Any]:
    """An assistant's message that calls a function and says nothing."""
    return assistant("", tool_calls=[{"type": "function", "function": {"name": name, "arguments": arguments}}])


def tokenizer_of(template: str) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer with a template of this corpus, whose turns end with special tokens."""
    made = copy.deepcopy(_plain_tokenizer())
    made.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    return made


@cache
def _plain_tokenizer() -> PreTrainedTokenizerBase:
    made = train_tokenizer(["the quick brown fox"] * 3, 300)
    made.add_special_tokens({"additional_special_tokens": STOPS})
    return made


def marked(row: Mapping[str, Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The learned pieces of a row as text, in order."""
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    groups = groupby(pairs, key=lambda pair: pair[1] != -100)
    return [tokenizer.decode([token for token, _ in group]) for learned, group in groups if learned]

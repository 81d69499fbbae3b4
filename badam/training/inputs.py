"""Tokenizer and data of a run: which of the two is made from the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from badam.plan import Plan
from badam.training import demo_data
from badam.training.data import TrainingData, load_data, to_dataset
from badam.training.options import RunOptions
from badam.training.tokenizer import CHAT_TEMPLATE, load_tokenizer, prepare_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_inputs(
    plan: Plan, options: RunOptions, tokenizer_from: str | None
) -> tuple[PreTrainedTokenizerBase, TrainingData]:
    """The tokenizer and the data of a run.

    The tokenizer decides whether prompts become chat messages; where there is none, it is trained on the data.

    Args:
        plan: for the size of the vocabulary.
        options: which data.
        tokenizer_from: Hub id or directory; None trains one.

    Raises:
        DataError: see badam.training.data.load_data.
        InputError: see badam.training.tokenizer.load_tokenizer.
    """
    vocabulary_size = int(plan.model.config["vocab_size"])
    tokenizer = load_tokenizer(tokenizer_from, vocabulary_size) if tokenizer_from else None
    data = _data(options, chat=tokenizer is not None and tokenizer.chat_template is not None)
    if tokenizer is None:
        tokenizer = train_tokenizer(_texts(data), vocabulary_size)
    if data.kind == "messages" and tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    prepare_tokenizer(tokenizer)
    return tokenizer, data


def _data(options: RunOptions, *, chat: bool) -> TrainingData:
    if options.data != demo_data.NAME:
        return load_data(options.data, chat=chat, columns=options.columns, split=options.split)
    dataset = to_dataset(demo_data.stdlib_docstrings())
    assert dataset is not None, "an empty standard library is an error of its own"
    return TrainingData(
        dataset, "prompt-completion", f"docstrings of Python's standard library ({len(dataset):,} records)"
    )


def _texts(data: TrainingData) -> Iterator[str]:
    """All text in the data, for training a tokenizer."""
    for row in data.dataset:
        for value in cast("dict[str, Any]", row).values():
            if isinstance(value, str):
                yield value
            else:
                yield from (message["content"] for message in value)

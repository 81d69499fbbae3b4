"""Tokenizer and data of a run: which of the two is made from the other, and what is held out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from badam.errors import InputError
from badam.plan import Plan
from badam.training.data import demo as demo_data
from badam.training.data.dataset import TrainingData, load_data, to_dataset
from badam.training.data.tokenizer import CHAT_TEMPLATE, load_tokenizer, prepare_tokenizer, train_tokenizer
from badam.training.options import RunOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run reads."""

    tokenizer: PreTrainedTokenizerBase
    training: TrainingData
    evaluation: TrainingData | None


def load_inputs(plan: Plan, options: RunOptions, tokenizer_from: str | None) -> Inputs:
    """The tokenizer and the data of a run.

    The tokenizer decides whether prompts become chat messages; where there is none, it is trained on the data.

    Args:
        plan: for the size of the vocabulary and the task.
        options: which data.
        tokenizer_from: Hub id or directory; None trains one.

    Raises:
        DataError: see badam.training.data.dataset.load_data.
        InputError: see badam.training.data.tokenizer.load_tokenizer; or if nothing can be held out.
    """
    vocabulary_size = int(plan.model.config["vocab_size"])
    tokenizer = load_tokenizer(tokenizer_from, vocabulary_size) if tokenizer_from else None
    chat = tokenizer is not None and tokenizer.chat_template is not None
    classes = plan.model.task == "sequence-classification"
    training = _data(options, options.data, options.split, chat=chat, classes=classes)
    evaluation = None
    if options.eval_data is not None:
        evaluation = _data(options, options.eval_data, options.eval_split, chat=chat, classes=classes)
        if evaluation.kind != training.kind:
            raise InputError(
                f"{options.data} holds {training.kind}, {options.eval_data} holds {evaluation.kind}.",
                advice="Give evaluation data of the form of the training data.",
            )
    elif options.eval_share:
        training, evaluation = hold_out(training, options.eval_share, options.seed)
    if tokenizer is None:
        tokenizer = train_tokenizer(_texts(training), vocabulary_size)
    if training.kind == "messages" and tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    prepare_tokenizer(tokenizer)
    return Inputs(tokenizer, training, evaluation)


def hold_out(data: TrainingData, share: float, seed: int) -> tuple[TrainingData, TrainingData]:
    """Divide data at random into what is trained on and ``share`` of it for evaluation; the same for the same seed.

    Raises:
        InputError: if one of the two would be empty.
    """
    count = len(data.dataset)
    held = round(share * count)
    if not 0 < held < count:
        raise InputError(
            f"--eval-share {share:g} of {count} records holds out {held}.",
            advice="Give another share, or data of their own with --eval-data.",
        )
    order = random.Random(seed).sample(range(count), count)
    kept, apart = data.dataset.select(sorted(order[held:])), data.dataset.select(sorted(order[:held]))
    text = f"{data.description}, {held:,} of them held out"
    return (
        replace(data, dataset=kept, description=text),
        replace(data, dataset=apart, description=f"{held:,} records held out", skipped=0),
    )


def _data(options: RunOptions, source: str, split: str, *, chat: bool, classes: bool) -> TrainingData:
    if source != demo_data.NAME:
        return load_data(
            source,
            chat=chat,
            classes=classes,
            columns=options.columns,
            split=split,
            directory=options.data_directory,
        )
    if classes:
        raise InputError("The built-in data has no classes.", advice="Give labelled records with --data FILE.")
    dataset = to_dataset(demo_data.stdlib_docstrings(), options.data_directory)
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

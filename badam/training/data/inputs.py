"""Tokenizer and data of a run: which of the two is made from the other, what is held out, tokens and labels."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from badam.errors import DataError, InputError
from badam.plan import Plan
from badam.training.build import model_config
from badam.training.data import demo as demo_data
from badam.training.data.bad_rows import BadRows
from badam.training.data.batches import LengthReport, enforce_length, pack
from badam.training.data.dataset import TrainingData, in_directory, load_data, placed_row, to_dataset
from badam.training.data.tokenizer import CHAT_TEMPLATE, load_tokenizer, prepare_tokenizer, train_tokenizer
from badam.training.data.tokens import Labeller
from badam.training.options import RunOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CLASSIFICATION = "sequence-classification"


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run reads.

    The data of a language model is tokenized: ``input_ids`` and ``labels``. That of a classification is text.
    """

    tokenizer: PreTrainedTokenizerBase
    training: TrainingData
    evaluation: TrainingData | None
    vocabulary_size: int  # rows of the model's embedding, which all ids are below
    lengths: LengthReport | None = None  # of the training data of a language model
    packed: int | None = None  # rows that its examples were packed into

    @property
    def pad_token_id(self) -> int:
        """What batches are padded with: a token that the model knows, though its tokenizer may have one of its own."""
        tokens = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in tokens if token is not None and token < self.vocabulary_size)


def load_inputs(plan: Plan, options: RunOptions, tokenizer_from: str | None) -> Inputs:
    """The tokenizer and the data of a run.

    The tokenizer decides whether prompts become chat messages; where there is none, it is trained on the data.

    Args:
        plan: for the size of the vocabulary, the length and the task.
        options: which data, and what is learned of it.
        tokenizer_from: Hub id or directory; None trains one.

    Raises:
        DataError: for everything that can be wrong with the data; names line, byte or columns.
        InputError: see badam.training.data.tokenizer.load_tokenizer; if nothing can be held out; or if an option does
            not go with the data.
    """
    vocabulary_size = int(model_config(plan.model).get_text_config().vocab_size)
    tokenizer = load_tokenizer(tokenizer_from) if tokenizer_from else None
    chat = tokenizer is not None and tokenizer.chat_template is not None
    classes = plan.model.task == CLASSIFICATION
    if classes and options.loss_on is not None:
        raise InputError("A classification has no turns to choose between.", advice="Leave --loss-on out.")
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
    if tokenizer.chat_template is None and any(data and data.conversations for data in (training, evaluation)):
        tokenizer.chat_template = CHAT_TEMPLATE
    prepare_tokenizer(tokenizer)
    inputs = Inputs(tokenizer, training, evaluation, vocabulary_size)
    return inputs if classes else _tokenized(inputs, options, plan.training.seq_len)


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
        replace(data, dataset=apart, description=f"{held:,} records held out", skipped=0, notes=()),
    )


def _data(options: RunOptions, source: str, split: str, *, chat: bool, classes: bool) -> TrainingData:
    if source != demo_data.NAME:
        bad = BadRows(options.on_bad_row)
        data = load_data(
            source,
            chat=chat,
            classes=classes,
            columns=options.columns,
            split=split,
            records=options.records,
            bad=bad,
            directory=options.data_directory,
        )
        return replace(data, notes=(*data.notes, *([bad.sentence] if bad.sentence else [])))
    if classes:
        raise InputError("The built-in data has no classes.", advice="Give labelled records with --data FILE.")
    pairs = (placed_row(pair, source) for pair in demo_data.stdlib_docstrings())
    dataset = to_dataset(pairs, options.data_directory)
    assert dataset is not None, "an empty standard library is an error of its own"
    return TrainingData(
        dataset, "prompt-completion", f"docstrings of Python's standard library ({len(dataset):,} records)"
    )


def _tokenized(inputs: Inputs, options: RunOptions, limit: int) -> Inputs:
    """The same with tokens and labels, no example longer than allowed."""
    with in_directory(options.data_directory):
        training = _labelled(inputs.training, inputs, options)
        dataset, lengths = enforce_length(training.dataset, limit, options.on_long)
        packed = pack(dataset, limit) if options.pack else dataset
        evaluation = None
        if inputs.evaluation is not None:
            evaluation = _labelled(inputs.evaluation, inputs, options)
            kept, _ = enforce_length(evaluation.dataset, limit, options.on_long)
            evaluation = replace(evaluation, dataset=kept)
    return replace(
        inputs,
        training=replace(training, dataset=packed),
        evaluation=evaluation,
        lengths=lengths,
        packed=len(packed) if options.pack else None,
    )


def _labelled(data: TrainingData, inputs: Inputs, options: RunOptions) -> TrainingData:
    import pyarrow

    bad = BadRows(options.on_bad_row)
    label = Labeller(inputs.tokenizer, loss_on=options.loss_on, rows=inputs.vocabulary_size, bad=bad)
    tokens = pyarrow.list_(pyarrow.int32())
    schema = pyarrow.schema({"input_ids": tokens, "labels": tokens})
    dataset = to_dataset(label(data.records()), options.data_directory, schema=schema)
    refused = [bad.sentence] if bad.sentence else []
    if dataset is None:
        raise DataError(
            f"None of the {len(data.dataset):,} records of {data.description} has tokens to learn from.",
            advice=bad.sentence or "Choose another part of them with --loss-on.",
        )
    notes = (*data.notes, *label.notes, *refused)
    return replace(data, dataset=dataset, skipped=data.skipped + label.empty, notes=notes)


def _texts(data: TrainingData) -> Iterator[str]:
    """All text in the data, for training a tokenizer."""
    if data.kind == "classes":
        for row in data.dataset:
            yield from _strings(row)
    else:
        for record, _ in data.records():
            yield from _strings(record)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, entry in value.items():
            if key != "role":
                yield from _strings(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _strings(entry)

"""Data of a classification: names of classes, tokens of texts and pairs of texts, batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from badam.errors import DataError
from badam.training.data.batches import LengthReport, length_report, padded
from badam.vocabulary import OnLong

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Classes:
    """The names of the classes, by index; numbers if the data has numbers."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, labels: Iterable[str], count: int) -> Classes:
        """The classes of training data.

        Args:
            labels: of the examples, as text.
            count: classes that the model tells apart.

        Raises:
            DataError: if the data has more classes than the model.
        """
        found = set(labels)
        if all(label.isdigit() for label in found):
            names = [str(number) for number in range(max(map(int, found)) + 1)]
        else:
            names = sorted(found)
        if len(names) > count:
            raise DataError(
                f"The data has {len(names)} classes ({', '.join(names[:5])}{', ...' if names[5:] else ''}); "
                f"the plan's model has {count}.",
                advice=f"Plan with --num-labels {len(names)}.",
            )
        return cls(tuple(names))

    def index(self, label: str) -> int:
        """The index of a class.

        Raises:
            DataError: if no training example has it.
        """
        if label not in self.names:
            raise DataError(
                f"The evaluation data has the class {label!r}, which the training data does not have.",
                advice=f"Known: {', '.join(self.names)}.",
            )
        return self.names.index(label)

    def name_in(self, config: Any) -> None:
        """Write names that are words into a model's configuration, so that its predictions can be read."""
        if all(name.isdigit() for name in self.names):
            return
        names = [*self.names, *(f"LABEL_{index}" for index in range(len(self.names), config.num_labels))]
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in enumerate(names)}


def encode(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, classes: Classes, limit: int, on_long: OnLong, *, rows: int
) -> tuple[Dataset, LengthReport]:
    """Tokenize texts and pairs of texts; longer ones are cut at the end of their longer part, special tokens stay.

    Args:
        dataset: with ``text``, ``label`` and possibly ``pair``.
        tokenizer: of the model.
        classes: of the training data.
        limit: the plan's sequence length.
        on_long: what happens to examples beyond it.
        rows: of the model's embedding: no token may have an id beyond.

    Returns:
        Examples with ``input_ids``, ``token_type_ids`` and ``label``, and their lengths before anything was cut.

    Raises:
        DataError: with ``refuse`` and longer examples; for an unknown class or token; or if no example is left.
    """

    def tokens(examples: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        texts = [list(examples[column]) for column in ("text", "pair") if column in examples]
        whole = tokenizer(*texts, return_token_type_ids=True, verbose=False)
        cut = tokenizer(*texts, truncation="longest_first", max_length=limit, return_token_type_ids=True)
        for text, ids in zip(texts[0], cut["input_ids"], strict=True):
            if max(ids) >= rows:
                raise DataError(
                    f"The token {tokenizer.convert_ids_to_tokens(max(ids))!r} has the id {max(ids)}, the model's "
                    f"vocabulary ends with {rows - 1}; it stands in the example {text[:60]!r}.",
                    advice="Use the tokenizer that the model was made with.",
                )
        return {
            "input_ids": cut["input_ids"],
            "token_type_ids": cut["token_type_ids"],
            "label": [classes.index(label) for label in examples["label"]],
            "length": [len(ids) for ids in whole["input_ids"]],
        }

    encoded = dataset.map(tokens, batched=True, remove_columns=dataset.column_names)
    report, kept = length_report(torch.tensor(encoded["length"]).numpy(), limit, on_long)
    return encoded.select(kept).remove_columns("length"), report


class ClassCollator:
    """Makes a batch of at most ``seq_len`` tokens per example, padded on the right under an attention mask.

    Args:
        seq_len: the plan's sequence length.
        pad_token_id: what padding is made of.
        token_types: whether the model tells the two texts of a pair apart by ``token_type_ids``.
    """

    def __init__(self, seq_len: int, pad_token_id: int, *, token_types: bool) -> None:
        self.seq_len = seq_len
        self.pad_token_id = pad_token_id
        self.token_types = token_types
        self.full_length = True
        self.tokens = 0

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` (and ``token_type_ids``) [n, length], ``labels`` [n], all int64."""
        rows = [example["input_ids"] for example in examples]
        length = self.seq_len if self.full_length else max(len(row) for row in rows)
        self.tokens += sum(len(row) for row in rows)
        batch = {
            "input_ids": padded(rows, length, self.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in rows], length, 0),
            "labels": torch.tensor([example["label"] for example in examples]),
        }
        if self.token_types:
            batch["token_type_ids"] = padded([example["token_type_ids"] for example in examples], length, 0)
        return batch

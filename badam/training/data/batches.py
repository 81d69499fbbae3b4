"""Batches of the plan's size: never larger, and padded so that predicted memory is also used when it is measured."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Sampler

from badam.errors import DataError
from badam.training.losses import IGNORE_INDEX
from badam.vocabulary import OnLong

if TYPE_CHECKING:
    from datasets import Dataset


class Collator(Protocol):
    """Makes the batches of a run, and counts what is in them."""

    full_length: bool  # pad to the plan's length, not only to the longest example of the batch
    tokens: int  # collated so far, padding left out

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The model's inputs with ``labels``."""


@dataclass(frozen=True, slots=True)
class LengthReport:
    """Lengths of the examples in tokens, before anything was cut."""

    examples: int
    median: int
    ninth_decile: int
    longest: int
    limit: int
    longer: int  # examples beyond the limit
    dropped: int  # examples left out: too long, or with nothing to learn within the limit

    def __str__(self) -> str:
        share = self.longer / self.examples
        text = (
            f"{self.examples:,} examples of {self.median} tokens in the middle, {self.ninth_decile} at 90 %, "
            f"{self.longest} at most; {self.longer:,} ({share:.1%}) are longer than the plan's {self.limit}"
        )
        return f"{text}; {self.dropped:,} left out" if self.dropped else text


def enforce_length(dataset: Dataset, limit: int, on_long: OnLong) -> tuple[Dataset, LengthReport]:
    """Leave out examples that cannot be trained on within ``limit`` tokens; the collator cuts the others.

    An example whose labels within the limit are all ignored (a prompt that fills it) has nothing to learn.

    Args:
        dataset: with ``input_ids`` and ``labels``.
        limit: the plan's sequence length.
        on_long: what happens to examples beyond it.

    Raises:
        DataError: with ``refuse`` and longer examples; or if no example is left.
    """
    lengths = token_counts(dataset)

    def hopeless(index: int) -> bool:
        return not _learns(dataset[index]["labels"], limit)

    report, kept = length_report(lengths, limit, on_long, hopeless)
    return (dataset if len(kept) == len(dataset) else dataset.select(kept)), report


def length_report(
    lengths: Any, limit: int, on_long: OnLong, hopeless: Callable[[int], bool] = lambda _index: False
) -> tuple[LengthReport, list[int]]:
    """What is said of the lengths of examples, and which of them are kept.

    Args:
        lengths: tokens of each example, a numpy array.
        limit: the plan's sequence length.
        on_long: what happens to examples beyond it.
        hopeless: whether the longer example at an index has nothing to learn once it is cut.

    Raises:
        DataError: with ``refuse`` and longer examples; or if no example is left.
    """
    longer = [int(index) for index in (lengths > limit).nonzero()[0]]
    if longer and on_long == "refuse":
        raise DataError(
            f"{len(longer):,} of {len(lengths):,} examples are longer than the plan's {limit} tokens, "
            f"the longest has {lengths.max():,}.",
            advice=f"Plan for --seq-len {lengths.max()}, or allow --on-long truncate.",
        )
    dropped = set(longer) if on_long == "drop" else {index for index in longer if hopeless(index)}
    report = LengthReport(
        examples=len(lengths),
        median=_quantile(lengths, 0.5),
        ninth_decile=_quantile(lengths, 0.9),
        longest=int(lengths.max()),
        limit=limit,
        longer=len(longer),
        dropped=len(dropped),
    )
    if len(dropped) == len(lengths):
        raise DataError(
            f"No example can be trained on within the plan's {limit} tokens: {report}.",
            advice=f"Plan for a longer --seq-len; the median example has {report.median} tokens.",
        )
    return report, [index for index in range(len(lengths)) if index not in dropped]


def pack(dataset: Dataset, limit: int) -> Dataset:
    """Put as many whole examples as fit into rows of ``limit`` tokens, which have the columns of ``dataset``.

    An example that is longer is cut. TRL's best-fit packing; the examples of a row follow each other in one causal
    sequence without a mask between them, so that a row takes the memory of any other row of its length.
    """
    from trl import pack_dataset

    packed = pack_dataset(dataset.select_columns(["input_ids", "labels"]), limit, "bfd")
    return packed.select_columns(["input_ids", "labels"])


def token_counts(dataset: Dataset) -> Any:
    """Tokens of each example, as a numpy array."""
    import pyarrow.compute

    return pyarrow.compute.list_value_length(dataset.with_format("arrow")[:]["input_ids"]).to_numpy()


class PlanCollator:
    """Makes a batch of at most ``seq_len`` tokens per example, padded on the right.

    There is no attention mask and there are no position ids: the causal mask hides padding on the right from every
    token that counts, and with a mask transformers would leave the memory-saving attention path.

    Args:
        seq_len: the plan's sequence length.
        pad_token_id: what padding is made of; its labels are ignored.
    """

    def __init__(self, seq_len: int, pad_token_id: int) -> None:
        self.seq_len = seq_len
        self.pad_token_id = pad_token_id
        self.full_length = True
        self.tokens = 0

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """``input_ids`` and ``labels``, int64 of shape [len(examples), length]."""
        lengths = [min(len(example["input_ids"]), self.seq_len) for example in examples]
        length = self.seq_len if self.full_length else max(lengths)
        self.tokens += sum(lengths)
        return {
            "input_ids": padded([example["input_ids"] for example in examples], length, self.pad_token_id),
            "labels": padded([example["labels"] for example in examples], length, IGNORE_INDEX),
        }


def padded(rows: Sequence[Sequence[int]], length: int, padding: int) -> Tensor:
    """Rows cut and padded on the right to ``length``; int64 of shape [len(rows), length]."""
    cut = [list(row[:length]) for row in rows]
    return torch.tensor([row + [padding] * (length - len(row)) for row in cut], dtype=torch.int64)


class EpochSampler(Sampler[int]):
    """A new order in every epoch, as a pure function of seed and epoch, so that a resumed run sees the same data.

    Args:
        dataset: whose indices to order.
        seed: of the order.
        rank, count: this process and how many there are: they take turns, and all have equally many examples, for
            which the first ones come twice where their number does not divide.
    """

    def __init__(self, dataset: Sized, seed: int, rank: int = 0, count: int = 1) -> None:
        self._size = len(dataset)
        self._seed = seed
        self._rank = rank
        self._count = count
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self._size // self._count)

    def __iter__(self) -> Iterator[int]:
        order = list(range(self._size))
        random.Random(f"{self._seed}:{self.epoch}").shuffle(order)
        repeated = (order * self._count)[: len(self) * self._count]
        return iter(repeated[self._rank :: self._count])


def _learns(labels: Sequence[int], limit: int) -> bool:
    return any(label != IGNORE_INDEX for label in labels[1:limit])  # nothing predicts the first token


def _quantile(lengths: Any, fraction: float) -> int:
    ordered = sorted(lengths)
    return int(ordered[min(len(ordered) - 1, int(fraction * len(ordered)))])

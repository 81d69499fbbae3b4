"""Two tasks from one real corpus that every machine has, the sources of Python's standard library.

The library's modules are dealt into two halves by their names. On the sources of one half a model is trained from
random weights, to continue code; on the other half it is then fine-tuned to write the docstring for a signature, with
the loss over the docstring alone. Every tenth pair of that half is held out for evaluation.
"""

from __future__ import annotations

import random
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from badam.training.data.demo import SKIPPED_DIRECTORIES, docstring_pairs
from badam.training.data.tokenizer import train_tokenizer
from badam.training.losses import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_BYTES = 4_000_000  # of source text that the tokenizer is trained on
LONGEST_SOURCE = 200_000  # bytes; larger files are tables
LEAST_ANSWER = 4  # tokens of a docstring within the length, below which a pair is left out
HELD_OUT = 10  # every tenth pair

Example = dict[str, list[int]]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Both tasks in tokens."""

    tokenizer: PreTrainedTokenizerBase
    sources: list[int]  # of the first half, one file after the other
    training: list[Example]  # pairs of the second half: input_ids and labels, at most the asked-for length
    evaluation: list[Example]


def load_corpus(vocabulary: int, length: int) -> Corpus:
    """Read, tokenize and divide the standard library; the same on every call with one Python.

    Args:
        vocabulary: of the tokenizer that is trained on the sources of both halves.
        length: tokens that a pair is cut to.
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts = dict(_sources(root))
    tokenizer = train_tokenizer(_sample(texts), vocabulary)
    sources: list[int] = []
    for name, text in texts.items():
        if _half(name) == 0:
            sources += tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    pairs = (pair for pair in docstring_pairs(root) if _half(_module(pair["prompt"])) == 1)
    examples = [example for pair in pairs if (example := _example(pair, tokenizer, length)) is not None]
    return Corpus(
        tokenizer=tokenizer,
        sources=sources,
        training=[example for index, example in enumerate(examples) if index % HELD_OUT],
        evaluation=examples[::HELD_OUT],
    )


def endless_order(count: int, seed: int) -> Iterator[int]:
    """Numbers below ``count`` in a random order, and then in another one, forever."""
    draw = random.Random(seed)
    while True:
        yield from draw.sample(range(count), count)


def batches(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Batches of ``size`` examples in the order of ``seed``, forever."""
    order = endless_order(len(examples), seed)
    while True:
        yield [examples[index] for index in islice(order, size)]


def _sources(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_DIRECTORIES.isdisjoint(parts) and path.stat().st_size <= LONGEST_SOURCE:
            yield ".".join(parts).removesuffix(".py"), path.read_text(encoding="utf-8", errors="ignore")


def _half(module: str) -> int:
    """0 or 1, by the name of the package: its modules stay together."""
    return zlib.crc32(module.split(".")[0].encode()) % 2


def _module(prompt: str) -> str:
    return prompt.partition("\n")[0].removeprefix("# ")


def _sample(texts: dict[str, str]) -> Iterator[str]:
    taken = 0
    for name in sorted(texts, key=lambda name: zlib.crc32(name.encode())):
        taken += len(texts[name])
        if taken > TOKENIZER_BYTES:
            return
        yield texts[name]


def _example(pair: dict[str, str], tokenizer: PreTrainedTokenizerBase, length: int) -> Example | None:
    prompt = tokenizer(pair["prompt"])["input_ids"]
    answer = tokenizer(pair["completion"])["input_ids"] + [tokenizer.eos_token_id]
    if len(prompt) + LEAST_ANSWER > length:
        return None
    return {
        "input_ids": (prompt + answer)[:length],
        "labels": ([IGNORE_INDEX] * len(prompt) + answer)[:length],
    }

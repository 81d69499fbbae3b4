"""Training data as TRL's trainer takes it, from whatever the user has."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from badam.errors import DataError, InputError
from badam.training.data.files import PlacedRow, read_rows
from badam.training.data.formats import Format, Kind, SftRow, detect

if TYPE_CHECKING:
    from datasets import Dataset

CHUNK_ROWS = 4096
"""Rows that exist as Python objects at a time; Arrow keeps the rest in a tenth of the memory, or on the disk."""


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Data ready for tokenization.

    ``dataset`` has the columns of ``kind``; ``skipped`` rows had nothing to learn from (an empty answer).
    """

    dataset: Dataset
    kind: Kind
    description: str
    skipped: int = 0


def load_data(
    source: str,
    *,
    chat: bool,
    classes: bool = False,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    directory: Path | None = None,
) -> TrainingData:
    """Read and convert training data.

    Args:
        source: file, directory or Hub id.
        chat: whether prompts become chat messages, because the tokenizer has a template for them.
        classes: whether the data is for a classification.
        columns: names that the formats know, and the data's names for them.
        split: of a Hub data set.
        directory: where large data may lie while it is used, see :func:`to_dataset`.

    Raises:
        DataError: for everything that can be wrong with data; names line, byte or columns.
    """
    rows = (PlacedRow(_renamed(row, columns or {}), place) for row, place in read_rows(source, split=split))
    first = next(rows, None)
    if first is None:
        raise DataError(f"{source} has no records.", advice="Give a file with at least one record.")
    known = detect(first.row.keys(), source=first.place, classes=classes)
    converted = _Converter(known, chat)
    dataset = to_dataset(converted(chain([first], rows)), directory)
    if dataset is None:
        raise DataError(
            f"None of the {converted.skipped} records of {source} has text to learn from.",
            advice=f"Check the column {known.needed[-1]}.",
        )
    return TrainingData(dataset, known.kind, f"{source} ({known.name}, {len(dataset):,} records)", converted.skipped)


def to_dataset(rows: Iterable[SftRow], directory: Path | None = None) -> Dataset | None:
    """An Arrow data set of ``rows``, made in chunks; None if there is no row.

    Args:
        rows: all with the same columns.
        directory: for a file of them if they are more than a chunk. What ``datasets`` makes of a data set in a file
            lies in files beside it, too, instead of several times in memory.

    Raises:
        InputError: if the file cannot be written.
    """
    import pyarrow
    from datasets import Dataset

    tables = (pyarrow.Table.from_pylist(chunk) for chunk in _chunks(rows))
    first = list(islice(tables, 2))
    if len(first) == 2 and directory is not None:
        with in_directory(directory):
            return Dataset.from_file(_written(chain(first, tables), first[0].schema, directory))
    return Dataset(pyarrow.concat_tables([*first, *tables])) if first else None


@contextmanager
def in_directory(directory: Path) -> Iterator[None]:
    """Work that keeps data in files of ``directory``.

    Raises:
        InputError: if they cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"The data could not be prepared in {directory}: {error.strerror or error}.",
            advice="Make room on its disk, or choose another one with --output-dir.",
        ) from error


def _written(tables: Iterable[Any], schema: Any, directory: Path) -> str:
    import pyarrow

    directory.mkdir(parents=True, exist_ok=True)
    handle, path = tempfile.mkstemp(suffix=".arrow", dir=directory)
    with os.fdopen(handle, "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        for table in tables:
            writer.write_table(table)
    return path


class _Converter:
    """Converts rows one by one and counts those that are left out."""

    def __init__(self, known: Format, chat: bool) -> None:
        self._known = known
        self._chat = chat
        self.skipped = 0

    def __call__(self, rows: Iterable[PlacedRow]) -> Iterator[SftRow]:
        for row, place in rows:
            missing = [name for name in self._known.needed if name not in row]
            if missing:
                raise DataError(f"{place}: the record lacks {', '.join(missing)}, which the first record has.")
            try:
                converted = self._known.convert(row, self._chat)
            except ValueError as error:
                raise DataError(f"{place}: {error}.") from error
            if converted is None:
                self.skipped += 1
            else:
                yield converted


def _renamed(row: Mapping[str, object], columns: Mapping[str, str]) -> Mapping[str, object]:
    return {**row, **{name: row[theirs] for name, theirs in columns.items() if theirs in row}} if columns else row


def _chunks(rows: Iterable[SftRow]) -> Iterator[list[SftRow]]:
    chunk: list[SftRow] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == CHUNK_ROWS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk

"""Training data as a run takes it, from whatever the user has."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from badam.errors import DataError, InputError
from badam.training.data.bad_rows import BadRows
from badam.training.data.files import PlacedRow, read_rows
from badam.training.data.formats import Format, Kind, SftRow, detect

if TYPE_CHECKING:
    from datasets import Dataset

CHUNK_ROWS = 4096
"""Rows that exist as Python objects at a time; Arrow keeps the rest in a tenth of the memory, or on the disk."""


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Data ready for tokenization.

    ``dataset`` has the columns of a classification, or ``record`` with JSON (objects in Arrow would have to have the
    same keys in all records) and ``place``; ``skipped`` rows had nothing to learn from (an empty answer).
    """

    dataset: Dataset
    kind: Kind
    description: str
    skipped: int = 0
    notes: tuple[str, ...] = ()
    """What the user should know of what was read: one sentence each."""
    conversations: bool = False
    """Whether there are messages, so that a chat template is needed."""

    def records(self) -> Iterator[tuple[SftRow, str]]:
        """The records of a language model, see badam.training.data.formats, and the place of each for errors."""
        for row in self.dataset:
            yield json.loads(row["record"]), row["place"]


def load_data(
    source: str,
    *,
    chat: bool,
    classes: bool = False,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    records: str | None = None,
    bad: BadRows | None = None,
    directory: Path | None = None,
) -> TrainingData:
    """Read and convert training data.

    Args:
        source: file, directory or Hub id.
        chat: whether prompts become chat messages, because the tokenizer has a template for them.
        classes: whether the data is for a classification.
        columns: names that the formats know, and the data's names for them.
        split: of a Hub data set.
        records: key of the list of records in a JSON file that is an object.
        bad: what happens to records that cannot be read; refuses them by default.
        directory: where large data may lie while it is used, see :func:`to_dataset`.

    Raises:
        DataError: for everything that can be wrong with data; names line, byte or columns.
    """
    bad = bad or BadRows()
    placed = read_rows(source, split=split, records=records, bad=bad)
    rows = (PlacedRow(_renamed(row, columns or {}), place) for row, place in placed)
    first = next(rows, None)
    if first is None:
        raise DataError(
            f"{source} has no records{' that can be read' if bad.count else ''}.",
            advice=bad.sentence or "Give a file with at least one record.",
        )
    known = _format_of(first, classes=classes)
    converted = _Converter(known, chat, bad)
    dataset = to_dataset(converted(chain([first], rows)), directory)
    if dataset is None:
        raise DataError(
            f"None of the {converted.skipped + bad.count} records of {source} has text to learn from.",
            advice=bad.sentence or f"Check the column {known.needed[-1]}.",
        )
    return TrainingData(
        dataset,
        known.kind,
        f"{source} ({known.name}, {len(dataset):,} records)",
        converted.skipped,
        converted.notes,
        converted.conversations,
    )


def placed_row(record: SftRow, place: str) -> SftRow:
    """A record of a language model as its data set holds it.

    Raises:
        UnicodeEncodeError: if it has text that is none, such as half of a pair of surrogates.
    """
    text = json.dumps(record, ensure_ascii=False)
    text.encode()
    return {"record": text, "place": place}


def to_dataset(rows: Iterable[SftRow], directory: Path | None = None, *, schema: Any = None) -> Dataset | None:
    """An Arrow data set of ``rows``, made in chunks; None if there is no row.

    Args:
        rows: all with the same columns.
        directory: for a file of them if they are more than a chunk. What ``datasets`` makes of a data set in a file
            lies in files beside it, too, instead of several times in memory.
        schema: their types; those of the first chunk by default.

    Raises:
        InputError: if the file cannot be written.
    """
    import pyarrow
    from datasets import Dataset

    tables = (pyarrow.Table.from_pylist(chunk, schema=schema) for chunk in _chunks(rows))
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


class _Seen(Mapping[str, Any]):
    """A row that knows which of its columns were looked at."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self._row = row
        self._seen: set[str] = set()

    def __getitem__(self, column: str) -> Any:
        self._seen.add(column)
        return self._row[column]

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)

    def unread(self) -> Iterator[str]:
        """Columns that nobody has looked at, and that hold something."""
        return (name for name, value in self._row.items() if name not in self._seen and value not in (None, "", [], {}))


class _Converter:
    """Converts rows one by one and counts what is left out: rows without anything to learn, columns without use."""

    def __init__(self, known: Format, chat: bool, bad: BadRows) -> None:
        self._known = known
        self._chat = chat
        self._bad = bad
        self._unread: Counter[str] = Counter()
        self.skipped = 0
        self.conversations = False

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of the rows so far."""
        if not self._unread:
            return ()
        columns = ", ".join(f"{name} ({count:,} records)" for name, count in self._unread.most_common())
        return (f"columns that are not used: {columns}",)

    def __call__(self, rows: Iterable[PlacedRow]) -> Iterator[SftRow]:
        for row, place in rows:
            seen = _Seen(row)
            try:
                converted = self._converted(seen, place)
            except DataError as error:
                self._bad.meet(error)
                continue
            self._unread.update(seen.unread())
            if converted is None:
                self.skipped += 1
            else:
                yield converted

    def _converted(self, row: Mapping[str, Any], place: str) -> SftRow | None:
        missing = [name for name in self._known.needed if name not in row]
        if missing:
            raise DataError(f"{place}: the record lacks {', '.join(missing)}, which the first record has.")
        try:
            converted = self._known.convert(row, self._chat)
            if converted is None or self._known.kind == "classes":
                return converted
            self.conversations |= "messages" in converted or not isinstance(converted.get("prompt", ""), str)
            return placed_row(converted, place)
        except UnicodeEncodeError as error:
            raise DataError(f"{place}: the record has text that is no Unicode: {error.reason}.") from error
        except ValueError as error:
            raise DataError(f"{place}: {error}.") from error


def _format_of(first: PlacedRow, *, classes: bool) -> Format:
    """The format of data by its first row.

    Raises:
        DataError: see :func:`detect`; where the row is an object around lists of records, names these.
    """
    try:
        return detect(first.row.keys(), source=first.place, classes=classes)
    except DataError as error:
        lists = [
            key
            for key, value in first.row.items()
            if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value)
        ]
        if not lists or ".json," not in first.place.lower():
            raise
        found = ", ".join(f"{name} ({len(first.row[name]):,})" for name in lists)
        raise DataError(
            f"{first.place} is one object; its lists of records: {found}.",
            advice=f"Name the list: --records {lists[0]}.",
        ) from error


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    if not columns:
        return row
    rest = {name: value for name, value in row.items() if name not in columns.values()}
    return {**rest, **{name: row[theirs] for name, theirs in columns.items() if theirs in row}}


def _chunks(rows: Iterable[SftRow]) -> Iterator[list[SftRow]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, CHUNK_ROWS)):
        yield chunk

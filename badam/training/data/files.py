"""Rows out of files and Hub data sets, each with the place that an error message names. No torch."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from badam.errors import DataError, require
from badam.training.data.bad_rows import BadRows

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
SAVED_DATASET_FILES = ("dataset_info.json", "state.json", "dataset_dict.json")
ONE_READ_BYTES = 2**26
"""Up to this size a JSON file with a fault is read as a whole to find its line, or to learn that it is none."""

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class PlacedRow(NamedTuple):
    """A row and where it stands, such as ``data.jsonl, line 17``."""

    row: Mapping[str, Any]
    place: str


def read_rows(
    source: str, *, split: str = "train", records: str | None = None, bad: BadRows | None = None
) -> Iterator[PlacedRow]:
    """Rows of a file, of all data files in a directory, or of a data set on the Hub.

    Args:
        source: path or Hub id.
        split: of a Hub data set, or of a saved one.
        records: key of the list of records in a JSON file that is an object; ``a.b`` for ``b`` within ``a``.
        bad: what happens to rows that cannot be read; refuses them by default.

    Raises:
        DataError: if the source does not exist, or a row of it cannot be read; names line or byte.
    """
    reading = _Reading(records, bad or BadRows())
    path = Path(source).expanduser()
    if path.is_dir():
        return _directory_rows(path, split, reading)
    if path.exists():
        return _file_rows(path, reading)
    if HUB_ID.fullmatch(source) and path.suffix.lower() not in READERS:
        return _hub_rows(source, split)
    raise DataError(f"There is no file or directory {source}.", advice=f"Known files: {', '.join(READERS)}.")


class _Reading(NamedTuple):
    records: str | None
    bad: BadRows


def _directory_rows(directory: Path, split: str, reading: _Reading) -> Iterator[PlacedRow]:
    if any((directory / name).exists() for name in SAVED_DATASET_FILES):
        yield from _saved_rows(directory, split)
        return
    files = sorted(path for path in directory.iterdir() if path.suffix.lower() in READERS)
    if not files:
        raise DataError(
            f"The directory {directory} has no data file.", advice=f"Files that are read: {', '.join(READERS)}."
        )
    for path in files:
        yield from _file_rows(path, reading)


def _file_rows(path: Path, reading: _Reading) -> Iterator[PlacedRow]:
    ending = path.suffix.lower()
    reader = READERS.get(ending)
    if reader is None:
        raise DataError(
            f"{path} has the ending {path.suffix or '(none)'}, which is not known.",
            advice=f"Known endings: {', '.join(READERS)}.",
        )
    if reading.records is not None and ending != ".json":
        raise DataError(f"--records names a list in a .json file; {path} has none.", advice="Leave --records out.")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty.", advice="Give a file with at least one record.")
        yield from reader(path, reading)
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.") from error


def _json_lines(path: Path, reading: _Reading) -> Iterator[PlacedRow]:
    offset = 0
    with _as_utf8(path) as lines:
        for number, line in enumerate(lines, start=1):
            row = None
            try:
                text = _decode(line, path, offset).rstrip("\r\n")
                if text.strip():
                    row = _object(_parse(text, path, number), path, f"line {number}")
            except DataError as error:
                reading.bad.meet(error)
            offset += len(line)
            if row is not None:
                yield row


def _json(path: Path, reading: _Reading) -> Iterator[PlacedRow]:
    """A JSON array of objects, one under a key, or, as many ``.json`` files are, one object per line."""
    with _as_utf8(path) as file:
        begin = next((line for line in file if line.strip()), b"").strip()
    if reading.records is not None and begin.startswith(b"["):
        raise DataError(f"{path} is a list of records, not an object with one.", advice="Leave --records out.")
    if reading.records is not None or not begin.startswith(b"{"):
        yield from _array(path, reading.records, reading)
    elif _is_object(begin):
        yield from _json_lines(path, reading)
    else:
        raise _lists_of(path)


def _array(path: Path, records: str | None, reading: _Reading) -> Iterator[PlacedRow]:
    """The objects of a JSON array, without ever holding more than one of them."""
    import ijson

    name = f"{records} " if records else ""
    number = 0
    try:
        with _as_utf8(path) as file:
            for number, value in enumerate(ijson.items(file, _item(records), use_float=True), start=1):
                yield from _met(value, path, f"{name}record {number}", reading)
    except ijson.JSONError as error:
        # What the standard library takes and this one does not: NaN, infinity, numbers beyond a float.
        for later, value in enumerate(_whole(path, records, error, number)[number:], start=number + 1):
            yield from _met(value, path, f"{name}record {later}", reading)
        return
    if number == 0 and records is not None:
        raise _lists_of(path, records)


def _met(value: Any, path: Path, place: str, reading: _Reading) -> Iterator[PlacedRow]:
    """The row, if it is one."""
    try:
        row = _object(value, path, place)
    except DataError as error:
        reading.bad.meet(error)
    else:
        yield row


def _whole(path: Path, records: str | None, fault: Exception, number: int) -> list[Any]:
    """The values of a file that a streaming parser has refused after ``number`` of them.

    Raises:
        DataError: with line and column of the fault.
    """
    if path.stat().st_size > ONE_READ_BYTES:
        message = str(fault).strip().splitlines()[0]
        raise DataError(f"{path} is not JSON after record {number}: {message}.", advice=_SHAPES) from fault
    with _as_utf8(path) as file:
        text = _decode(file.read(), path)
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise _not_json(path, error.msg, error.lineno, error.colno) from error
    for key in records.split(".") if records else ():
        found = found[key]
    return list(found)


def _lists_of(path: Path, asked: str | None = None) -> DataError:
    """That a file is one object, and which lists of objects it has."""
    import ijson

    lists: Counter[str] = Counter()
    try:
        with _as_utf8(path) as file:
            for place, event, _ in ijson.parse(file):
                if event == "start_map" and place.endswith(".item") and ".item" not in place.removesuffix(".item"):
                    lists[place.removesuffix(".item")] += 1
    except ijson.JSONError as error:
        try:
            _whole(path, None, error, 0)
        except DataError as placed:
            return placed
    if not lists:
        return DataError(f"{path} is one object without a list of records.", advice=_SHAPES)
    found = ", ".join(f"{name} ({count:,})" for name, count in lists.items())
    if asked is None:
        message = f"{path} is one object; its lists of records: {found}."
    else:
        message = f"{path} has no list of records {asked}; it has {found}."
    return DataError(message, advice=f"Name the list: --records {next(iter(lists))}.")


def _item(records: str | None) -> str:
    return f"{records}.item" if records else "item"


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _csv(path: Path, reading: _Reading) -> Iterator[PlacedRow]:
    with _as_utf8(path) as file:
        text = _decode(file.read(), path)
    csv.field_size_limit(2**31 - 1)  # a text may be longer than the 131,072 characters that are allowed by default
    lines = csv.DictReader(io.StringIO(text, newline=""), delimiter=_delimiter(text, path))
    try:
        for row in lines:
            if None in row or None in row.values():
                reading.bad.meet(
                    DataError(
                        f"{path}, line {lines.line_num}: the row has another number of fields than the "
                        f"{len(lines.fieldnames or ())} column names.",
                        advice="Put fields that contain the delimiter in quotes.",
                    )
                )
            else:
                yield PlacedRow(row, f"{path}, line {lines.line_num}")
    except csv.Error as error:
        raise DataError(f"{path}, line {lines.line_num}: {error}.") from error


def _delimiter(text: str, path: Path) -> str:
    """A comma, or what stands in its place where the column names have none."""
    names = text.partition("\n")[0]
    if path.suffix.lower() == ".tsv":
        return "\t"
    return "," if "," in names else next((other for other in ";\t|" if other in names), ",")


def _text_file(path: Path, _reading: _Reading) -> Iterator[PlacedRow]:
    """Plain text: passages between blank lines."""
    with _as_utf8(path) as file:
        text = _decode(file.read(), path)
    for number, passage in enumerate(re.split(r"\n\s*\n", text.replace("\r\n", "\n")), start=1):
        yield PlacedRow({"text": passage.strip("\n")}, f"{path}, passage {number}")


def _parquet(path: Path, _reading: _Reading) -> Iterator[PlacedRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield PlacedRow(_arrow_row(row), f"{path}, row {number}")
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a parquet file that can be read: {error}.") from error


def _saved_rows(directory: Path, split: str) -> Iterator[PlacedRow]:
    datasets = _datasets()
    try:
        loaded = datasets.load_from_disk(str(directory))
    except (OSError, ValueError) as error:
        raise DataError(f"The saved data set {directory} cannot be read: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(
                f"The saved data set {directory} has no split {split}.", advice=f"It has {', '.join(loaded)}: --split."
            )
        loaded = loaded[split]
    for number, row in enumerate(loaded, start=1):
        yield PlacedRow(_arrow_row(row), f"{directory}, row {number}")


def _hub_rows(name: str, split: str) -> Iterator[PlacedRow]:
    datasets = _datasets()
    try:
        loaded = datasets.load_dataset(name, split=split)
    except Exception as error:  # offline, unknown, gated, no such split: the library has a class for each, no base
        raise DataError(
            f"{name} is neither a file here nor a data set on the Hub ({_first_line(error)}).",
            advice="Give a local file or directory; without --data, docstrings of Python's library are used.",
        ) from error
    for number, row in enumerate(loaded, start=1):
        yield PlacedRow(_arrow_row(row), f"{name}, row {number}")


READERS: dict[str, Callable[[Path, _Reading], Iterator[PlacedRow]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _text_file,
}
"""How the files of each ending are read."""


def _arrow_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without the keys that Arrow adds to make all objects of a column alike."""
    return {column: _without_padding(value) for column, value in row.items()}


def _without_padding(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_padding(entry) for key, entry in value.items() if entry is not None}
    return [_without_padding(entry) for entry in value] if isinstance(value, list) else value


def _as_utf8(path: Path) -> BinaryIO:
    """A file to read, past a mark of its encoding.

    Raises:
        DataError: if it is in UTF-16 without such a mark.
    """
    file = path.open("rb")
    head = file.read(4096)
    if head.startswith(_UTF16):
        with file:
            content = head + file.read()
        try:
            return io.BytesIO(content.decode("utf-16").encode())
        except UnicodeError as error:
            raise DataError(f"{path} begins as UTF-16 text and is none: {error}.") from error
    if b"\0" in head:
        file.close()
        raise DataError(
            f"{path} has zero bytes, as UTF-16 text without a mark and binary files have.",
            advice=f"Convert text: iconv -f utf-16le -t utf-8 {path.name} > fixed{path.suffix}.",
        )
    file.seek(_mark_bytes(head))
    return file


def _mark_bytes(head: bytes) -> int:
    return len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0


def _decode(content: bytes, path: Path, offset: int = 0) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        with path.open("rb") as file:
            offset += _mark_bytes(file.read(3))
        raise DataError(
            f"{path} is not UTF-8 text: byte {offset + error.start} is 0x{content[error.start]:02x}.",
            advice=f"Convert it: iconv -f latin1 -t utf-8 {path.name} > fixed{path.suffix}.",
        ) from error


_SHAPES = "Give a JSON array of objects, or one object per line."


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _not_json(path, error.msg, line + error.lineno - 1, error.colno) from error


def _not_json(path: Path, message: str, line: int, column: int) -> DataError:
    return DataError(f"{path} is not JSON: {message} at line {line}, column {column}.", advice=_SHAPES)


def _object(value: Any, path: Path, place: str) -> PlacedRow:
    if not isinstance(value, dict):
        raise DataError(
            f"{path}, {place}: a record must be an object with named fields, found {type(value).__name__}.",
            advice=_SHAPES,
        )
    return PlacedRow(value, f"{path}, {place}")


def _datasets() -> Any:
    require("Reading this data", {"datasets": "datasets"}, extra="train")
    import datasets

    return datasets


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__

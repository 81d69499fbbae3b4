"""Rows out of files and Hub data sets, each with the place that an error message names. No torch."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from badam.errors import DataError, require
from badam.training.data.json_array import BrokenJson, BrokenText, array_values

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
SAVED_DATASET_FILES = ("dataset_info.json", "state.json", "dataset_dict.json")


class PlacedRow(NamedTuple):
    """A row and where it stands, such as ``data.jsonl, line 17``."""

    row: Mapping[str, Any]
    place: str


def read_rows(source: str, *, split: str = "train") -> Iterator[PlacedRow]:
    """Rows of a file, of all data files in a directory, or of a data set on the Hub.

    Args:
        source: path or Hub id.
        split: of a Hub data set.

    Raises:
        DataError: if the source does not exist, or a row of it cannot be read; names line or byte.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _directory_rows(path)
    if path.exists():
        return _file_rows(path)
    if HUB_ID.fullmatch(source) and path.suffix.lower() not in READERS:
        return _hub_rows(source, split)
    raise DataError(f"There is no file or directory {source}.", advice=f"Known files: {', '.join(READERS)}.")


def _directory_rows(directory: Path) -> Iterator[PlacedRow]:
    if any((directory / name).exists() for name in SAVED_DATASET_FILES):
        yield from _saved_rows(directory)
        return
    files = sorted(path for path in directory.iterdir() if path.suffix.lower() in READERS)
    if not files:
        raise DataError(
            f"The directory {directory} has no data file.", advice=f"Files that are read: {', '.join(READERS)}."
        )
    for path in files:
        yield from _file_rows(path)


def _file_rows(path: Path) -> Iterator[PlacedRow]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path} has the ending {path.suffix or '(none)'}, which is not known.",
            advice=f"Known endings: {', '.join(READERS)}.",
        )
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty.", advice="Give a file with at least one record.")
        yield from reader(path)
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.") from error


def _json_lines(path: Path) -> Iterator[PlacedRow]:
    offset = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = _decode(line, path, offset)
            offset += len(line)
            if text.strip():
                yield _object(_parse(text.rstrip("\r\n"), path, first_line=number), path, f"line {number}")


def _json(path: Path) -> Iterator[PlacedRow]:
    """A JSON array of objects, or, as many ``.json`` files are, one object per line."""
    with path.open("rb") as file:
        start = file.read(4096).lstrip()
    if not start.startswith(b"["):
        yield from _json_lines(path)
        return
    try:
        for number, value in enumerate(array_values(path), start=1):
            yield _object(value, path, f"record {number}")
    except BrokenJson as error:
        raise _not_json(path, error.message, error.line, error.column) from error
    except BrokenText as error:
        raise _not_text(path, error.position, error.byte) from error


def _csv(path: Path) -> Iterator[PlacedRow]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(io.StringIO(_decode(path.read_bytes(), path), newline=""), delimiter=delimiter)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{path}, line {reader.line_num}: the row has another number of fields than the "
                    f"{len(reader.fieldnames or ())} column names.",
                    advice="Put fields that contain the delimiter in quotes.",
                )
            yield PlacedRow(row, f"{path}, line {reader.line_num}")
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}.") from error


def _text_file(path: Path) -> Iterator[PlacedRow]:
    """Plain text: passages between blank lines."""
    for number, passage in enumerate(re.split(r"\n\s*\n", _decode(path.read_bytes(), path)), start=1):
        yield PlacedRow({"text": passage.strip("\n")}, f"{path}, passage {number}")


def _parquet(path: Path) -> Iterator[PlacedRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield PlacedRow(row, f"{path}, row {number}")
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a parquet file that can be read: {error}.") from error


def _saved_rows(directory: Path) -> Iterator[PlacedRow]:
    datasets = _datasets()
    try:
        loaded = datasets.load_from_disk(str(directory))
    except (OSError, ValueError) as error:
        raise DataError(f"The saved data set {directory} cannot be read: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        loaded = loaded.get("train") or next(iter(loaded.values()))
    for number, row in enumerate(loaded, start=1):
        yield PlacedRow(row, f"{directory}, row {number}")


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
        yield PlacedRow(row, f"{name}, row {number}")


READERS: dict[str, Callable[[Path], Iterator[PlacedRow]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _text_file,
}
"""How the files of each ending are read."""


def _decode(content: bytes, path: Path, offset: int = 0) -> str:
    try:
        return content.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise _not_text(path, offset + error.start, content[error.start]) from error


def _not_text(path: Path, position: int, byte: int) -> DataError:
    return DataError(
        f"{path} is not UTF-8 text: byte {position} is 0x{byte:02x}.",
        advice=f"Convert it: iconv -f latin1 -t utf-8 {path.name} > fixed{path.suffix}.",
    )


def _parse(text: str, path: Path, *, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _not_json(path, error.msg, first_line + error.lineno - 1, error.colno) from error


def _not_json(path: Path, message: str, line: int, column: int) -> DataError:
    return DataError(
        f"{path} is not JSON: {message} at line {line}, column {column}.",
        advice="Give a JSON array of objects, or one object per line.",
    )


def _object(value: Any, path: Path, place: str) -> PlacedRow:
    if not isinstance(value, dict):
        raise DataError(
            f"{path}, {place}: a record must be an object with named fields, found {type(value).__name__}.",
            advice="Give a JSON array of objects, or one object per line.",
        )
    return PlacedRow(value, f"{path}, {place}")


def _datasets() -> Any:
    require("Reading this data", {"datasets": "datasets"}, extra="train")
    import datasets

    return datasets


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__

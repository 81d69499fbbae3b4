"""A JSON array is read value by value, whatever falls onto the end of a chunk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from badam.training.data.json_array import BrokenJson, BrokenText, array_values

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def values_of(path: Path, content: str | bytes, chunk_bytes: int) -> list[Any]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(array_values(path, chunk_bytes=chunk_bytes))


@example([1e-07, -1.5, 12, 1e300], 1, None, False)
@given(st.lists(VALUES, max_size=4), st.sampled_from([1, 2, 7, 4096]), st.sampled_from([None, 1]), st.booleans())
@settings(deadline=None, max_examples=100)
def test_values_are_those_of_the_json_library(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], chunk_bytes: int, indent: int | None, ascii_only: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "array.json"
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    content = text.encode("utf-8", errors="surrogatepass" if ascii_only else "replace")
    assert values_of(path, content, chunk_bytes) == json.loads(content)


@pytest.mark.parametrize("chunk_bytes", [1, 5, 4096])
@pytest.mark.parametrize(
    "text",
    ["", " ", "[", "[1", "[1,", "[1 2]", '[\n {"a": 1},\n {"a" 1}\n]', "[]\n[]", "[tru]", '["a\nb"]', "[1]x"],
)
def test_a_fault_is_where_the_json_library_finds_it(tmp_path: Path, text: str, chunk_bytes: int) -> None:
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(BrokenJson) as found:
        values_of(tmp_path / "array.json", text, chunk_bytes)
    assert (found.value.line, found.value.column) == (expected.value.lineno, expected.value.colno)


def test_anything_but_an_array_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BrokenJson, match="Expecting"):
        values_of(tmp_path / "array.json", "{}", 4096)


def test_a_byte_that_is_no_text_is_found_across_chunks(tmp_path: Path) -> None:
    for chunk_bytes in (1, 2, 3, 4096):
        with pytest.raises(BrokenText) as found:
            values_of(tmp_path / "array.json", b'\xef\xbb\xbf["\xc3\xa9", "\xc3x"]', chunk_bytes)
        assert (found.value.position, found.value.byte) == (11, 0xC3)


def test_no_more_than_a_value_and_a_chunk_is_held(tmp_path: Path) -> None:
    path = tmp_path / "array.json"
    path.write_text(json.dumps(["x" * 100] * 1000), encoding="utf-8")
    values = array_values(path, chunk_bytes=256)
    next(values)
    window: Any = values.gi_frame.f_locals["text"]  # type: ignore[attr-defined]
    for _ in range(500):
        next(values)
        assert len(window._text) < 1024

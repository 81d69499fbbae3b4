from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from badam.errors import InputError
from badam.units import GIB, KIB, MIB, format_bytes, format_count, format_gib, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KIB, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (MIB - 1, "1024.00 KiB"),
        (MIB, "1.00 MiB"),
        (GIB, "1.00 GiB"),
        (25_425_190_912, "23.68 GiB"),
        (4096 * GIB, "4096.00 GiB"),
        (-3 * MIB, "-3.00 MiB"),
        (-5, "-5 B"),
    ],
)
def test_bytes_are_told_in_the_largest_unit_that_keeps_them_above_one(size: int, expected: str) -> None:
    assert format_bytes(size) == expected


def test_digits_can_be_chosen() -> None:
    assert format_bytes(GIB // 3, digits=0) == "341 MiB"
    assert format_gib(3 * GIB // 2, digits=1) == "1.5"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.00123, "1.2 ms"),
        (0.999, "999.0 ms"),
        (1, "1.00 s"),
        (59.9, "59.90 s"),
        (60, "1 min 00 s"),
        (306, "5 min 06 s"),
        (3600, "1 h 00 min"),
        (25_700, "7 h 08 min"),
    ],
)
def test_durations_are_told_as_people_say_them(seconds: float, expected: str) -> None:
    assert format_seconds(seconds) == expected


@pytest.mark.parametrize(
    ("count", "expected"),
    [(999, "999"), (1000, "1.00 k"), (13_107_200, "13.11 M"), (6_738_415_616, "6.74 B"), (10**12, "1000.00 B")],
)
def test_counts_are_told_in_thousands_millions_and_billions(count: int, expected: str) -> None:
    assert format_count(count) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GiB", 24 * GIB),
        ("24 gib", 24 * GIB),
        (" 512 MiB ", 512 * MIB),
        ("1.5KiB", 1536),
        ("23.7 GB", 23_700_000_000),
        ("2kb", 2000),
        ("3 MB", 3_000_000),
        ("1TiB", 1024 * GIB),
        ("1073741824", GIB),
        ("7B", 7),
    ],
)
def test_sizes_are_read_with_binary_and_decimal_units(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "24 parsecs", "24,5GiB", "-1GiB", "0", "0.1B", "1e9", "nan", "inf", "1 2"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match="is not a size of memory") as refusal:
        parse_bytes(text)
    assert refusal.value.advice is not None
    assert "24GiB" in refusal.value.advice


def test_a_size_of_hundreds_of_digits_is_read_exactly() -> None:
    assert parse_bytes("9" * 400 + "TiB") == int("9" * 400) * 2**40


@given(st.integers(1, 2**60), st.sampled_from([("GiB", GIB), ("MiB", MIB), ("KiB", KIB), ("B", 1), ("GB", 10**9)]))
def test_whole_numbers_of_any_unit_are_read_to_the_byte(number: int, unit: tuple[str, int]) -> None:
    assert parse_bytes(f"{number}{unit[0]}") == number * unit[1]


@given(st.integers(0, 2**50))
def test_what_is_written_is_read_back_to_the_precision_that_was_written(size: int) -> None:
    text = format_bytes(size)
    unit = {"GiB": GIB, "MiB": MIB, "KiB": KIB, "B": 1}[text.split()[1]]
    assert size == 0 or abs(parse_bytes(text) - size) <= 0.005 * unit + 1


@given(st.text(max_size=20))
def test_any_text_is_a_size_or_a_sentence_that_repeats_it(text: str) -> None:
    try:
        told = parse_bytes(text) > 0
    except InputError as error:
        told = repr(text) in error.message
    assert told

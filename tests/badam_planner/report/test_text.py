from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from badam.units import GIB, MIB
from badam_planner.accuracy.comparison import Pair
from badam_planner.report.text import clean, error_in_words, error_percent, shorten, signed_bytes, unit_for


@given(st.text(), st.integers(2, 60))
def test_shortened_names_fit_and_keep_both_ends(name: str, width: int) -> None:
    short = shorten(name, width)
    assert len(short) <= width
    if len(name) > width >= 4:
        assert (short[0], short[-1]) == (name[0], name[-1])


@given(st.text())
def test_cleaned_names_hold_nothing_unprintable(name: str) -> None:
    assert clean(name).isprintable()
    assert len(clean(name)) == len(name)


def test_errors_say_their_direction() -> None:
    assert error_in_words(Pair(90, 100)) == "10.00%, 10 B too low"
    assert error_in_words(Pair(110, 100)) == "10.00%, 10 B too high"
    assert error_in_words(Pair(100, 100)) == "exact"
    assert error_in_words(Pair(None, 100)) == "not measured"


def test_signs_and_missing_figures() -> None:
    assert [signed_bytes(size) for size in (2048, -2048, 0, None)] == ["+2.00 KiB", "-2.00 KiB", "exact", "-"]
    assert [error_percent(Pair(*sizes)) for sizes in ((105, 100), (1, 0), (None, 1))] == [
        "+5.00%",
        "none measured",
        "-",
    ]


def test_an_error_is_never_shown_as_none() -> None:
    shown = [error_percent(Pair(10**9 + extra, 10**9)) for extra in (0, 1, -1, 10**6)]
    assert shown == ["0.00%", "+<0.01%", "-<0.01%", "+0.10%"]
    assert error_in_words(Pair(10**9 - 1, 10**9)) == "<0.01%, 1 B too low"


def test_numbers_of_small_models_are_in_mib() -> None:
    assert [unit_for(size).name for size in (GIB, GIB - 1)] == ["GiB", "MiB"]
    assert [unit_for(size).number(size) for size in (3 * GIB, 3 * MIB)] == ["3.00", "3.00"]

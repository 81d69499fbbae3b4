from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from badam.vocabulary import Category
from badam_planner.report.terminal.bars import FILLS, UNSPLIT, Bar, StackedBars
from tests.badam_planner.report.rendering import render

SIZES = st.integers(1, 2**40)


def test_every_category_has_its_own_character_letter_and_colour() -> None:
    assert set(FILLS) == {*Category, UNSPLIT}
    assert len({fill.glyph for fill in FILLS.values()}) == len(FILLS)
    assert len({fill.letter for fill in FILLS.values()}) == len(FILLS)


@given(st.lists(SIZES, min_size=1, max_size=4), st.integers(60, 200))
def test_length_of_a_bar_does_not_depend_on_how_it_is_split(sizes: list[int], width: int) -> None:
    names = [Category.PARAMETER, Category.MASTER, Category.GRADIENT, Category.ACTIVATION]
    split = Bar("a", "", tuple(zip(names, sizes, strict=False)))
    whole = Bar("b", "", ((UNSPLIT, sum(sizes)),))
    longest = Bar("c", "", ((UNSPLIT, sum(sizes) * 2),))
    lines = render(StackedBars([split, whole, longest], limit_bytes=2**60), width, encoding="ascii").splitlines()
    first, second = (sum(character in "PMGA=" for character in line.split("  ")[1]) for line in lines[:2])
    assert first == second

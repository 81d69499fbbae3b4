"""Which steps are measured where measuring costs time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from badam.profiling.selection import StepSelection

steps = st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans(), st.integers(1, 9)), max_size=80)


@given(steps)
def test_the_largest_batch_of_every_block_and_place_is_measured(taken: list[tuple[int, bool, bool, int]]) -> None:
    selection = StepSelection()
    measured: dict[tuple[int, bool, bool], list[int]] = {}
    for block, first, last, size in taken:
        if selection.pick(block, first=first, last=last, batch_size=size):
            measured.setdefault((block, first, last), []).append(size)
    for key in {step[:3] for step in taken}:
        sizes = [size for *place, size in taken if tuple(place) == key]
        assert max(measured[key]) == max(sizes)
        assert measured[key] == sorted(set(measured[key]))

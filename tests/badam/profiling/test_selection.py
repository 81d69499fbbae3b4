"""Which steps are measured where measuring costs time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from badam.profiling.selection import StepSelection

steps = st.lists(
    st.tuples(st.integers(0, 2), st.booleans(), st.booleans(), st.integers(0, 3), st.integers(1, 5)), max_size=80
)


@given(steps)
def test_of_every_block_and_place_nothing_larger_is_left_out(taken: list[tuple[int, bool, bool, int, int]]) -> None:
    selection = StepSelection()
    measured = [
        step
        for step in taken
        if selection.pick(step[0], first=step[1], last=step[2], states=step[3], batch_size=step[4])
    ]
    for *place, states, size in taken:
        alike = [step for step in measured if list(step[:3]) == place]
        assert any(known >= states and largest >= size for *_, known, largest in alike)


@given(steps)
def test_what_was_measured_is_not_measured_again(taken: list[tuple[int, bool, bool, int, int]]) -> None:
    selection = StepSelection()
    picked = [
        selection.pick(block, first=first, last=last, states=states, batch_size=size)
        for block, first, last, states, size in [*taken, *taken]
    ]
    assert not any(picked[len(taken) :])


def test_a_step_that_finds_its_states_is_measured_too() -> None:
    selection = StepSelection()
    place = {"first": True, "last": False, "batch_size": 8}
    assert [selection.pick(0, states=states, **place) for states in (0, 4, 4)] == [True, True, False]

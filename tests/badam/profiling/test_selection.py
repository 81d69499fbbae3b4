"""Which steps are measured where measuring costs time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from badam.profiling.selection import ComingStep, StepSelection

coming = st.builds(ComingStep, st.integers(0, 2), st.booleans(), st.booleans(), st.integers(0, 3), st.integers(1, 3))
steps = st.lists(st.tuples(coming, st.integers(1, 5)), max_size=80)


def visit(block: int, length: int, active: int = 10) -> list[ComingStep]:
    """The steps of one visit: moments exist from the second on."""
    return [
        ComingStep(block, place == 0, place + 1 == length, states=active if place else 0, active=active)
        for place in range(length)
    ]


@given(steps)
def test_of_every_block_and_place_nothing_larger_is_left_out(taken: list[tuple[ComingStep, int]]) -> None:
    selection = StepSelection()
    measured = [(step, size) for step, size in taken if selection.pick(step, batch_size=size)]
    for step, size in taken:
        alike = [
            (known.states, largest)
            for known, largest in measured
            if (known.block, known.visit_begins) == (step.block, step.visit_begins)
        ]
        assert any(states >= step.states and largest >= size for states, largest in alike)


@given(steps)
def test_what_was_measured_is_not_measured_again(taken: list[tuple[ComingStep, int]]) -> None:
    selection = StepSelection()
    picked = [selection.pick(step, batch_size=size) for step, size in [*taken, *taken]]
    assert not any(picked[len(taken) :])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(2, 6), st.integers(1, 5)), max_size=20))
def test_no_step_that_finds_its_moments_is_left_out_of_any_block(visits: list[tuple[int, int, int]]) -> None:
    """Whatever first and last steps are spared for."""
    selection = StepSelection()
    largest: dict[int, int] = {}
    for block, length, size in visits:
        for step in visit(block, length):
            picked = selection.pick(step, batch_size=size, full_length=True)
            if not step.visit_begins:
                assert picked or largest[block] >= size
                if picked:
                    largest[block] = max(largest.get(block, 0), size)


def test_of_equal_blocks_the_second_step_of_each_and_one_first_and_last_are_measured() -> None:
    selection = StepSelection()
    picked = [
        [selection.pick(step, batch_size=8, full_length=True) for step in visit(block, 4)] for block in (0, 1, 2, 0, 1)
    ]
    assert picked == [
        [True, True, False, True],
        [False, True, False, False],
        [False, True, False, False],
        [False] * 4,
        [False] * 4,
    ]


def test_a_larger_block_shows_its_first_and_last_step_too() -> None:
    selection = StepSelection()
    sizes = ((0, 10), (1, 5), (2, 20))
    picked = [
        [selection.pick(step, batch_size=8, full_length=True) for step in visit(block, 3, active)]
        for block, active in sizes
    ]
    assert picked == [[True, True, True], [False, True, False], [True, True, True]]


def test_where_batches_differ_in_length_first_steps_are_not_spared() -> None:
    selection = StepSelection()
    picked = [[selection.pick(step, batch_size=8) for step in visit(block, 3)] for block in (0, 1)]
    assert picked == [[True, True, True], [True, True, False]]


def test_of_visits_of_one_step_each_block_is_measured() -> None:
    selection = StepSelection()
    steps = [ComingStep(block, True, True, 0, 10) for block in (0, 1, 0)]
    assert [selection.pick(step, batch_size=8, full_length=True) for step in steps] == [True, True, False]


def test_without_visits_a_step_that_finds_its_states_is_measured_too() -> None:
    selection = StepSelection()
    steps = [ComingStep(0, False, False, states, 4) for states in (0, 4, 4)]
    assert [selection.pick(step, batch_size=8) for step in steps] == [True, True, False]

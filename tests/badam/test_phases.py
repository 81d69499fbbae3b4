from __future__ import annotations

from collections.abc import Iterator

import pytest

from badam import phases
from badam.vocabulary import STEP_PHASES, Phase


@pytest.fixture(autouse=True)
def in_setup() -> Iterator[None]:
    phases.enter(Phase.SETUP)
    yield
    phases.enter(Phase.SETUP)


def test_the_phase_that_was_entered_is_the_current_one() -> None:
    phases.enter(Phase.FORWARD)
    assert phases.current() is Phase.FORWARD


def test_listeners_hear_what_ends_and_what_begins() -> None:
    heard: list[tuple[Phase, Phase]] = []
    with phases.listening(lambda before, after: heard.append((before, after))):
        phases.enter(Phase.FORWARD)
        phases.enter(Phase.LOSS)
    assert heard == [(Phase.SETUP, Phase.FORWARD), (Phase.FORWARD, Phase.LOSS)]


def test_listeners_already_find_the_new_phase_current() -> None:
    seen: list[Phase] = []
    with phases.listening(lambda _before, _after: seen.append(phases.current())):
        phases.enter(Phase.STEP)
    assert seen == [Phase.STEP]


def test_entering_the_current_phase_again_is_no_change() -> None:
    heard: list[Phase] = []
    with phases.listening(lambda _before, after: heard.append(after)):
        phases.enter(Phase.SETUP)
        with phases.within(Phase.SETUP):
            pass
    assert heard == []


def test_a_phase_within_another_returns_to_it() -> None:
    heard: list[Phase] = []
    phases.enter(Phase.BACKWARD)
    with phases.listening(lambda _before, after: heard.append(after)):
        with phases.within(Phase.RECOMPUTE):
            assert phases.current() is Phase.RECOMPUTE
        assert phases.current() is Phase.BACKWARD
    assert heard == [Phase.RECOMPUTE, Phase.BACKWARD]


def test_a_phase_within_another_returns_to_it_after_an_error() -> None:
    phases.enter(Phase.BACKWARD)
    with pytest.raises(ZeroDivisionError), phases.within(Phase.RECOMPUTE):
        _ = 1 / 0
    assert phases.current() is Phase.BACKWARD


def test_nobody_listens_after_the_with_block_even_after_an_error() -> None:
    heard: list[Phase] = []
    with pytest.raises(ZeroDivisionError), phases.listening(lambda _before, after: heard.append(after)):
        _ = 1 / 0
    phases.enter(Phase.FORWARD)
    assert heard == []


def test_all_listeners_hear_and_leave_on_their_own() -> None:
    first: list[Phase] = []
    second: list[Phase] = []
    with phases.listening(lambda _before, after: first.append(after)):
        with phases.listening(lambda _before, after: second.append(after)):
            phases.enter(Phase.FORWARD)
        phases.enter(Phase.LOSS)
    assert (first, second) == ([Phase.FORWARD, Phase.LOSS], [Phase.FORWARD])


def test_a_step_has_every_phase_but_what_lies_between_steps() -> None:
    assert set(STEP_PHASES) == set(Phase) - {Phase.SETUP}

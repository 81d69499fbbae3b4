from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from badam_planner.rehearsal import evaluator as evaluate
from badam_planner.rehearsal import workers
from badam_planner.rehearsal.evaluator import Evaluator
from badam_planner.rehearsal.workers import available_workers, run_all
from tests.badam_planner.rehearsal.plans import LLAMA, plan_of

pytestmark = pytest.mark.skipif(available_workers() == 1 and not hasattr(os, "fork"), reason="cannot fork here")

HERE = os.getpid()


def square(number: int) -> int:
    return number * number


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(), max_size=7), st.integers(1, 4))
def test_results_come_in_the_order_of_the_tasks(numbers: list[int], processes: int) -> None:
    assert run_all([partial(square, number) for number in numbers], processes) == [square(n) for n in numbers]


def test_the_work_is_shared() -> None:
    found = run_all([os.getpid] * 4, 2)
    assert found[0] == found[2] == os.getpid()
    assert found[1] == found[3] != os.getpid()


def killed_elsewhere() -> str:
    if os.getpid() != HERE:
        os.kill(os.getpid(), signal.SIGKILL)
    return "done here"


def fails_elsewhere() -> str:
    if os.getpid() != HERE:
        raise ValueError("for the test")
    return "done here"


@pytest.mark.parametrize("task", [killed_elsewhere, fails_elsewhere])
def test_what_a_fork_does_not_answer_is_done_here(task: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.HERE", os.getpid())
    assert run_all([task] * 3, 3) == ["done here"] * 3  # type: ignore[list-item]


def test_an_error_that_every_process_meets_is_raised_here() -> None:
    with pytest.raises(ZeroDivisionError):
        run_all([partial(divmod, 1, 0), partial(divmod, 1, 0)], 2)


def test_a_fork_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(f"{__name__}.HERE", os.getpid())

    def hang() -> str:
        if os.getpid() != HERE:
            signal.pause()
        return "done here"

    assert run_all([hang, hang], 2) == ["done here", "done here"]


@pytest.mark.parametrize("task", [os.getpid, partial(divmod, 1, 0)], ids=["done", "failed"])
def test_no_process_is_left_behind(task: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    forked: list[int] = []
    fork = os.fork

    def noting() -> int:
        forked.append(fork())
        return forked[-1]

    monkeypatch.setattr(os, "fork", noting)
    with suppress(ZeroDivisionError):
        run_all([task] * 4, 4)
    assert len(forked) == 3
    for child in forked:
        with pytest.raises(ChildProcessError):
            os.waitpid(child, os.WNOHANG)


def test_blocks_rehearsed_ahead_are_what_they_would_have_been(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, tree = plan_of(LLAMA, 9, strategy="matrix")
    alone, together = Evaluator(tree), Evaluator(tree, workers=2)
    expected = alone.every_block(plan, alone.worst_block(plan))
    together.prepare((plan, index) for index in together.decisive(plan))

    def not_again(*_: object, **__: object) -> None:
        raise AssertionError("rehearsed twice")

    monkeypatch.setattr(evaluate.Evaluator, "_record", not_again)
    assert together.worst_block(plan) == alone.worst_block(plan)
    monkeypatch.undo()
    assert together.every_block(plan, together.worst_block(plan)) == expected

"""Random configurations near a limit: drawn alike every time, judged, resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from badam.errors import BadamError
from benchmarks.gpu import budget, limits
from benchmarks.gpu.draws import CLOSE, MODELS, TOKENS_TIMES_PARAMETERS, Outcome, draw, load_budget, summary
from tests.benchmarks.tiny import CPU, write_model

DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> limits.Prepared:
    """A draw of a tiny model with its prediction; ten percent of headroom."""
    drawn = draw(0, seed=0, models=((write_model(tmp_path_factory.mktemp("draw")), 10**12),))
    return limits.prepare(drawn.model_copy(update={"fraction": 1.1}), CPU, "test")


def outcome(*, fraction: float, ran: bool | None) -> Outcome:
    one = draw(0, seed=0).model_copy(update={"fraction": fraction})
    return Outcome(
        draw=one, blocks=("a",), predicted_allocated_bytes=900, predicted_bytes=1000,
        limit_bytes=round(1000 * fraction), ran=ran,
    )  # fmt: skip


@given(index=st.integers(0, 10**4), seed=st.integers(0, 100))
def test_a_draw_is_a_function_of_its_number_close_to_the_limit_and_small_enough_to_be_quick(
    index: int, seed: int
) -> None:
    one = draw(index, seed=seed)
    assert one == draw(index, seed=seed)
    assert abs(one.fraction - 1) <= CLOSE
    parameters = dict(MODELS)[one.case.model]
    assert one.case.batch_size * one.case.seq_len * parameters <= TOKENS_TIMES_PARAMETERS


def test_neighbours_share_a_model_and_all_models_have_their_turn() -> None:
    drawn = [draw(index, seed=0, group=10).case.model for index in range(10 * len(MODELS))]
    assert drawn == [name for name, _ in MODELS for _ in range(10)]


@pytest.mark.parametrize(
    ("fraction", "ran", "verdict"),
    [
        (1.01, True, "right"),
        (1.01, False, "wrong fit"),
        (0.99, True, "false refusal"),
        (0.99, False, "right"),
        (1.0, False, "wrong fit"),
        (1.01, None, "undecided"),
    ],
)
def test_an_answer_is_judged_by_what_happened(fraction: float, ran: bool | None, verdict: str) -> None:
    assert outcome(fraction=fraction, ran=ran).verdict == verdict


def test_the_summary_tells_the_margin_that_would_have_turned_every_wrong_fit_into_a_refusal() -> None:
    outcomes = [outcome(fraction=fraction, ran=False) for fraction in (1.01, 1.04, 0.97)]
    assert summary(outcomes, 200) == (
        "3 of 200 draws: 2 wrong fits, 0 false refusals; a margin of 41 B would have prevented them"
    )


def test_draws_run_on_the_cpu_and_a_second_call_runs_none_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path / "out"), "--device", "cpu", "--cases", "2", "--models", write_model(tmp_path)]
    assert budget.main(arguments) == 0
    assert "2 of 2 draws: 0 wrong fits, 0 false refusals" in capsys.readouterr().out
    path = tmp_path / "out" / "budget-0000.json"
    for each in load_budget(path).outcomes:
        assert each.measured_bytes is not None
        assert each.measured_bytes == pytest.approx(each.predicted_bytes, rel=0.002)
        assert each.ran == (each.measured_bytes <= each.limit_bytes)
    before = path.stat().st_mtime_ns
    assert budget.main(arguments) == 0
    assert path.stat().st_mtime_ns == before
    assert "draws 0-1:" not in capsys.readouterr().out


def test_a_draw_that_fails_is_recorded_and_ends_the_process_for_the_sake_of_the_next(
    prepared: limits.Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "build_on", lambda *_: 1 / 0)
    outcomes = limits.run_all([prepared, prepared], DEVICE, "test")
    assert next(outcomes).ran is None
    with pytest.raises(BadamError, match="Draw 0 failed: ZeroDivisionError"):
        next(outcomes)


def test_a_draw_that_leaves_memory_behind_ends_the_process(
    prepared: limits.Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []

    def leak(*_: object) -> tuple[int, None]:
        kept.append(torch.zeros(prepared.outcome.limit_bytes, dtype=torch.uint8))
        return prepared.outcome.limit_bytes, None

    monkeypatch.setattr(limits, "_steps", leak)
    outcomes = limits.run_all([prepared, prepared], DEVICE, "test")
    assert next(outcomes).ran is True
    with pytest.raises(BadamError, match="Draw 0 left"):
        next(outcomes)


def test_a_refused_allocation_is_an_outcome(prepared: limits.Prepared, monkeypatch: pytest.MonkeyPatch) -> None:

    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr(limits, "_steps", refuse)
    (refused,) = limits.run_all([prepared], DEVICE, "test")
    assert refused.ran is False
    assert "2.00 MiB" in refused.message

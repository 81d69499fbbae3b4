from __future__ import annotations

import pytest

from badam.plan import Rates
from badam_planner.report.terminal.plan import render_candidates, render_peak, render_time
from tests.badam_planner import factories
from tests.badam_planner.report.rendering import assert_golden, render


@pytest.mark.parametrize("width", [80, 100, 120])
def test_candidates_at_a_width(width: int) -> None:
    assert_golden(f"candidates_{width}.txt", render(render_candidates(factories.search_result()), width))


@pytest.mark.parametrize("width", [80, 100, 120])
def test_every_figure_is_whole_at_every_width(width: int) -> None:
    large = factories.candidate(
        strategy="attn-mlp",
        num_blocks=1024,
        largest_block_parameters=999_999_999,
        checkpointing="none",
        formula_bytes=2**30 * 2890,
        peak_allocated_bytes=2**30 * 2891,
        peak_reserved_bytes=2**30 * 2892,
        peak_device_bytes=2**30 * 2893,
        headroom_bytes=-(2**30) * 2870,
        fits=False,
    )
    lines = render(render_candidates(factories.search_result(large)), width).splitlines()
    text = "\n".join(lines)
    for figure in ("1024", "1000.00 M", "2890.00", "2891.00", "2892.00", "2893.00", "-2870.00", "backward"):
        assert figure in text
    assert max(len(line) for line in lines) <= width


def test_recommended_and_too_big_are_marked_without_colour() -> None:
    lines = render(render_candidates(factories.search_result()), 100).splitlines()
    assert sum(line.startswith("▶ layer") for line in lines) == 1
    assert sum(line.startswith("✗ matrix") for line in lines) == 1
    assert "▶ recommended   ✗ does not fit" in lines


def test_marks_survive_a_terminal_without_their_characters() -> None:
    text = render(render_candidates(factories.search_result()), 100, encoding="ascii")
    assert "> layer" in text
    assert "x matrix" in text


def test_names_from_elsewhere_cannot_steer_the_terminal() -> None:
    text = render(render_candidates(factories.search_result(factories.candidate(peak_module="a\x1b[2J[bold]b"))), 120)
    assert "\x1b" not in text
    assert "[2J[bold]b" in text


def test_peak_bar_names_every_part_of_the_peak() -> None:
    result = factories.search_result()
    text = render(render_peak(result.candidates[0], result.usable_bytes), 100)
    assert "logits and loss" in text
    assert "20.00" in text


def test_a_small_model_is_shown_in_mib() -> None:
    small = {f"peak_{kind}_bytes": size * 2**20 for kind, size in (("allocated", 97), ("reserved", 98), ("device", 99))}
    text = render(render_candidates(factories.search_result(factories.candidate(**small))), 100)
    assert "Sizes in MiB." in text
    assert "99.00" in text


def test_candidates_that_count_on_expandable_segments_are_named_with_how_to_get_them() -> None:
    usual = render(render_candidates(factories.search_result()), 100)
    assert "xpandable" not in usual
    growing = factories.search_result(factories.candidate(expandable_segments=True), factories.candidate(method="lomo"))
    text = " ".join(render(render_candidates(growing), 100).split())
    assert "With expandable segments: layer. badam-train switches them on" in text
    assert "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" in text


def test_the_time_of_a_run_is_that_of_an_epoch_as_often_as_there_are_epochs() -> None:
    plan = factories.plan()
    assert plan.prediction is not None
    rates = Rates(flops_per_second={"bfloat16": 1e12}, bytes_per_second=1e12, basis="assuming 1 TFLOP/s")
    timed = plan.model_copy(
        update={
            "target": plan.target.model_copy(update={"rates": rates}),
            "prediction": plan.prediction.model_copy(update={"step_seconds": 0.5, "epoch_seconds": 600.0}),
        }
    )
    once, thrice = (" ".join(render(render_time(timed, epochs), 100).split()) for epochs in (1, 3))
    assert "an epoch 10 min 00 s, assuming" in once
    assert "an epoch 10 min 00 s, 3 epochs 30 min 00 s, assuming" in thrice

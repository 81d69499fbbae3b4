from __future__ import annotations

import re

import pytest

from badam.units import GIB
from badam.vocabulary import Category, Phase
from badam_planner.accuracy.compare import compare, summarize
from badam_planner.accuracy.comparison import Comparison
from badam_planner.report.terminal.comparison import render_accuracy, render_comparison, render_verdict
from tests.badam_planner import factories
from tests.badam_planner.report.rendering import assert_golden, render


def comparison(tolerance: float = 0.05, **measurement: object) -> Comparison:
    plan = factories.plan()
    return compare(plan, factories.measured_run(plan, measurement=dict(measurement)), tolerance=tolerance)


def test_comparison_at_80_columns() -> None:
    assert_golden("comparison_80.txt", render(render_comparison(comparison()), 80))


def test_comparison_on_a_terminal_without_block_characters() -> None:
    text = render(render_comparison(comparison()), 80, encoding="ascii")
    assert text.isascii()
    assert "PPPP" in text
    assert_golden("comparison_ascii.txt", text)


@pytest.mark.parametrize("width", [80, 100, 160])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    lines = render(render_comparison(comparison()), width).splitlines()
    assert max(len(line) for line in lines) <= width


def test_colour_adds_nothing_that_plain_text_does_not_say() -> None:
    coloured = render(render_comparison(comparison()), 80, colour=True)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert "\x1b[" in coloured
    assert [line.rstrip() for line in plain.splitlines()] == render(render_comparison(comparison()), 80).splitlines()


def test_predicted_times_stand_beside_the_measured_ones_where_the_plan_has_them() -> None:
    plan = factories.plan()
    assert plan.prediction is not None
    seconds = {Phase.FORWARD: 0.0123, Phase.BACKWARD: 0.0456}
    timed = plan.model_copy(
        update={"prediction": plan.prediction.model_copy(update={"seconds_by_phase": seconds, "step_seconds": 0.0579})}
    )
    text = render(render_comparison(compare(timed, factories.measured_run(timed))), 80)
    assert re.search(r"backward .* 45\.6 ms\n", text)
    assert re.search(r"forward .* 12\.3 ms\n", text)
    assert "(predicted 57.9 ms)" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_verdict_says_yes_and_no_in_words() -> None:
    assert render(render_verdict(comparison(0.02).verdict), 80) == (
        "WITHIN tolerance (2%): largest error 1.37%, 256.00 MiB too low (block layer 2)\n"
    )
    assert render(render_verdict(comparison(0.01).verdict), 80).startswith("OVER tolerance (1%)")


def test_limit_is_marked_at_its_place_on_the_scale() -> None:
    lines = render(render_comparison(comparison()), 80).splitlines()
    bars = [line for line in lines if re.match(r"\w* +(plan|run) ", line)]
    assert len(bars) == 10
    assert len({line.index("│") for line in bars}) == 1


def test_a_limit_far_away_is_named_and_does_not_squeeze_the_bars() -> None:
    plan = factories.plan()
    far = plan.model_copy(update={"target": plan.target.model_copy(update={"usable_bytes": 4001 * GIB})})
    text = render(render_comparison(compare(far, factories.measured_run(far))), 80)
    assert "the limit is 4000.00 GiB." in text
    assert "│" not in text
    assert "█" * 20 in text


def test_a_bar_of_a_record_that_contradicts_itself_keeps_the_length_of_its_total() -> None:
    by_phase = {**factories.BY_PHASE, Phase.BACKWARD: 2 * GIB}
    text = render(render_comparison(comparison(by_phase=by_phase)), 80)
    assert re.search(r"run  ━+ +│ +2\.00", text)


def test_unvisited_blocks_say_so() -> None:
    text = render(render_comparison(comparison(blocks=factories.block_measurements(2))), 80)
    assert re.search(r"layer 2 +18\.00 GiB +not visited", text)


def test_many_blocks_are_cut_to_the_most_wrong_and_the_rest_counted() -> None:
    plan = factories.plan(
        blocks=tuple(
            factories.block_plans(1)[0].model_copy(update={"name": f"b{index}", "peak_allocated_bytes": GIB})
            for index in range(100)
        )
    )
    blocks = tuple(
        factories.block_measurements(1)[0].model_copy(
            update={"name": f"b{index}", "peak_allocated_bytes": GIB + (7 if index == 42 else 0)}
        )
        for index in range(100)
    )
    run = factories.measured_run(plan, measurement={"blocks": blocks})
    text = render(render_comparison(compare(plan, run)), 80)
    assert "80 more blocks" in text
    assert "b42" in text


def test_names_cannot_steer_the_terminal_or_inject_markup() -> None:
    plan = factories.plan(model=factories.model("evil\x1b[31m[red]/[bold]x"))
    text = render(render_comparison(compare(plan, factories.measured_run(plan))), 80)
    assert "\x1b" not in text
    assert "[red]/[bold]x" in text


def test_accuracy_of_several_runs() -> None:
    plan = factories.plan()
    wrong = {
        "peak_allocated_bytes": 24 * GIB,
        "peak_device_bytes": 24 * GIB,
        "by_category": {**factories.MEASURED_BY_CATEGORY, Category.ACTIVATION: 10 * GIB},
        "peak_phase": Phase.LOSS,
    }
    accuracy = summarize(
        [compare(plan, factories.measured_run(plan)), compare(plan, factories.measured_run(plan, measurement=wrong))]
    )
    assert_golden("accuracy_80.txt", render(render_accuracy(accuracy), 80))

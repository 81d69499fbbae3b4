"""The chart of a measured step, module by module."""

from __future__ import annotations

from pathlib import Path

import pytest

from badam.errors import PlanError
from badam.profiling.modules.record import MODULES_FILE, ModuleTimelines, StepModules, save_module_timelines
from badam.units import GIB
from badam.vocabulary import Phase
from badam_planner.report.html.gather import read_modules
from badam_planner.report.html.run_charts import MOST_SPANS, modules_chart
from tests.badam_planner.report.html.pages import modules


def test_spans_are_drawn_where_and_as_long_as_they_were() -> None:
    chart = modules_chart(modules())
    assert chart is not None
    allocated, forward, backward = chart.traces
    assert (forward["base"], forward["x"], forward["y"]) == ([0.0, 1.0], [6.0, 3.0], [0, 1])
    assert (backward["base"], backward["x"], backward["y"]) == ([6.0], [4.0], [0])
    assert allocated["y"] == [10, 11, 14, 12, 13]
    assert allocated["text"][2] == "<b>14.00 GiB</b> in forward of model.layers.0"
    assert "<b>12.00 GiB</b> in forward, outside the modules" in allocated["text"]


def test_the_summary_says_where_the_peak_was() -> None:
    chart = modules_chart(modules())
    assert chart is not None
    assert "Step 5, with model.layers.0 active, took 10.0 ms" in chart.summary
    assert "Its peak is 14.00 GiB, in forward of model.layers.0." in chart.summary


def test_the_table_has_a_row_for_each_module() -> None:
    chart = modules_chart(modules())
    assert chart is not None
    assert chart.table.rows == (("model.layers.0", "3.0 ms", "-", "-", "14.00 GiB"),)


def test_a_recomputation_stands_below_the_backward_that_it_interrupts() -> None:
    step = StepModules(
        step=0, block="a", microseconds=(0, 1000, 2000, 3000), live_bytes=(1,) * 4, peak_bytes=(1,) * 4,
        module=(0, 1, 1), phase=(0, 0, 1), begin=(0, 0, 1), end=(3, 3, 2),
    )  # fmt: skip
    phases = (Phase.BACKWARD, Phase.RECOMPUTE)
    chart = modules_chart(ModuleTimelines(plan_digest="", names=("", "layer"), phases=phases, steps=(step,)))
    assert chart is not None
    _, backward, recomputation = chart.traces
    assert (backward["y"], recomputation["y"]) == ([0, 1], [2])


def test_of_very_many_spans_the_shortest_are_left_out_and_counted() -> None:
    count = MOST_SPANS + 10
    moments = tuple(index * (index + 1) // 2 for index in range(count + 1))  # each span longer than the last
    step = StepModules(
        step=0, block="a", microseconds=moments, live_bytes=(GIB,) * len(moments), peak_bytes=(GIB,) * len(moments),
        module=(0,) * count, phase=(0,) * count, begin=tuple(range(count)), end=tuple(range(1, count + 1)),
    )  # fmt: skip
    chart = modules_chart(ModuleTimelines(plan_digest="", names=("a",), phases=(Phase.FORWARD,), steps=(step,)))
    assert chart is not None
    assert len(chart.traces[1]["x"]) == MOST_SPANS
    assert "The 10 shortest stretches are not drawn." in chart.summary
    assert len(chart.traces[0]["y"]) == count + 1


def test_without_a_step_there_is_no_chart() -> None:
    assert modules_chart(modules().model_copy(update={"steps": ()})) is None


def test_only_what_the_same_plan_left_is_read(tmp_path: Path) -> None:
    measured = tmp_path / "measured.json"
    assert read_modules(measured, "digest") is None
    save_module_timelines(modules().model_copy(update={"plan_digest": "digest"}), tmp_path / MODULES_FILE)
    assert read_modules(measured, "digest") is not None
    assert read_modules(measured, "another") is None
    (tmp_path / MODULES_FILE).write_bytes(b"damaged")
    with pytest.raises(PlanError, match="module timelines"):
        read_modules(measured, "digest")

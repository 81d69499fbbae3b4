from __future__ import annotations

import pytest

from badam.units import GIB, KIB, MIB
from badam.vocabulary import Category
from badam_planner.accuracy.compare import block_rows
from badam_planner.report.html.chart import block_axis, category_style, limit_line, scale_for
from badam_planner.report.html.choice_charts import accuracy_chart, partitions_chart
from badam_planner.report.html.run_charts import (
    backward_chart,
    blocks_chart,
    curve_chart,
    parts_chart,
    phases_chart,
    timeline_chart,
)
from tests.badam_planner import factories
from tests.badam_planner.report.html.pages import comparison, curve, step_timeline


def test_unit_of_an_axis_follows_the_largest_value() -> None:
    assert [scale_for(size).unit for size in (3 * GIB, 3 * MIB, 3 * KIB, 3)] == ["GiB", "MiB", "KiB", "B"]
    assert scale_for(3 * GIB)(GIB // 2) == 0.5


def test_categories_are_told_apart_without_colour() -> None:
    shown = [category for category in Category if category not in (Category.CONTEXT, Category.CACHE)]
    assert len({category_style(category)[1] for category in shown}) == len(shown)


def test_timeline_stacks_categories_up_to_the_total_and_marks_the_peak() -> None:
    chart = timeline_chart(step_timeline())
    *areas, total = chart.traces
    assert [area["name"] for area in areas] == ["parameter", "activation"]
    assert [sum(values) for values in zip(*(area["y"] for area in areas), strict=True)] == total["y"]
    assert total["y"] == [11, 12, 14, 11]
    (marker,) = chart.layout["annotations"]
    assert (marker["x"], marker["y"]) == (2, 14)
    assert "14.00 GiB" in chart.summary
    assert "in backward" in total["text"][2]
    assert "model.layers.0.mlp: mm" in total["text"][2]


def test_limit_is_drawn_where_it_is_and_left_out_where_it_would_squeeze() -> None:
    chart = phases_chart(comparison())
    assert [shape["y0"] for shape in chart.layout["shapes"]] == [22]
    assert limit_line(3 * GIB, scale_for(GIB), vertical=True)["x1"] == 3
    far = factories.plan()
    far = far.model_copy(update={"target": far.target.model_copy(update={"usable_bytes": 900 * GIB})})
    blocks = blocks_chart(far, block_rows(far.partition.blocks))
    assert blocks is not None
    assert blocks.layout["shapes"] == []


def test_parts_chart_sums_to_the_peak() -> None:
    plan = factories.plan()
    assert plan.prediction is not None
    alone = parts_chart(plan.prediction, None)
    assert sum(alone.traces[0]["y"]) == 20
    assert alone.table.rows[-1] == ("sum", "20.00 GiB")
    beside = parts_chart(plan.prediction, comparison())
    assert [sum(trace["y"]) for trace in beside.traces] == [20, 20.25]


def test_blocks_chart_marks_the_worst_and_shows_measured_only_where_there_is_some() -> None:
    plan = factories.plan()
    chart = blocks_chart(plan, block_rows(plan.partition.blocks))
    assert chart is not None
    assert [trace["name"] for trace in chart.traces] == ["predicted"]
    assert chart.layout["annotations"][0]["text"] == "worst: layer 0"
    assert blocks_chart(plan, ()) is None
    both = blocks_chart(plan, comparison().blocks)
    assert both is not None
    assert [trace["name"] for trace in both.traces] == ["predicted", "measured"]


def test_partitions_chart_puts_every_candidate_once_and_names_its_standing() -> None:
    chart = partitions_chart(factories.search_result())
    assert {trace["name"]: len(trace["x"]) for trace in chart.traces} == {
        "recommended": 1,
        "fits": 1,
        "does not fit": 1,
    }
    assert len({trace["marker"]["symbol"] for trace in chart.traces}) == 3
    assert [row[-1] for row in chart.table.rows] == ["recommended", "fits", "does not fit"]
    assert chart.layout["shapes"][0]["x0"] == 23


def test_accuracy_chart_counts_what_lies_in_the_band() -> None:
    chart = accuracy_chart([comparison()])
    assert chart.summary == "11 of 11 compared peaks are within 5% of the measured."
    points = [trace for trace in chart.traces if trace.get("mode") == "markers"]
    assert sum(len(trace["x"]) for trace in points) == 11
    worse = accuracy_chart([comparison(), comparison(measurement={"peak_reserved_bytes": 30 * GIB})])
    assert worse.summary.startswith("21 of 22")
    assert any(row[0] == "run 2: reserved" for row in worse.table.rows)


def test_backward_chart_shows_both_sides_in_milliseconds() -> None:
    chart = backward_chart(comparison().blocks)
    assert chart is not None
    assert chart.traces[1]["y"] == pytest.approx([600, 400, 200])
    assert backward_chart(block_rows(factories.block_plans())) is None


def test_curve_shades_every_second_visit() -> None:
    chart = curve_chart(curve())
    assert [shape["opacity"] for shape in chart.layout["shapes"]] == [0, 0.15, 0, 0.15]
    assert [shape["x0"] for shape in chart.layout["shapes"]] == [-0.5, 2.5, 5.5, 8.5]
    assert "over 4 visits" in chart.summary


def test_what_all_block_names_begin_with_is_said_once() -> None:
    axis = block_axis([f"model.layers.{index}" for index in range(40)])
    assert axis["title"]["text"] == "block in model.layers"
    assert axis["ticktext"][:3] == ["0", "3", "6"]
    assert block_axis(["embed", "layer 0"])["ticktext"] == ["embed", "layer 0"]
    assert block_axis(["embed", *(f"h.{index}" for index in range(2)), "head"])["ticktext"] == [
        "embed",
        "0",
        "1",
        "head",
    ]
    assert block_axis(["a.b"])["ticktext"] == ["a.b"]


def test_parts_stand_in_the_order_of_the_vocabulary() -> None:
    shuffled = dict(sorted(factories.BY_CATEGORY.items()))
    plan = factories.plan(prediction={"by_category": shuffled})
    assert plan.prediction is not None
    assert parts_chart(plan.prediction, None).traces[0]["x"] == [str(name) for name in factories.BY_CATEGORY]

"""The charts that help to choose a method and a size."""

from __future__ import annotations

from badam.units import GIB
from badam.vocabulary import Category
from badam_planner.report.html.choice_charts import device_parts, methods_chart, sizes_chart
from badam_planner.report.html.pages import plan_page
from tests.badam_planner import factories
from tests.badam_planner.report.html.pages import several_methods, sizes


def test_every_method_has_one_bar_whose_parts_sum_to_its_device_peak() -> None:
    chart = methods_chart(several_methods())
    assert chart is not None
    (names,) = {tuple(trace["y"]) for trace in chart.traces}
    assert names == ("lora 21.0", "badam 22.0", "✗ adam 100.0")
    sums = [sum(values) for values in zip(*(trace["x"] for trace in chart.traces), strict=True)]
    assert sums == [21, 22, 100]


def test_a_method_that_was_left_out_is_named_with_its_reason() -> None:
    chart = methods_chart(several_methods(left_out=(("qlora", "It needs <a card>."),)))
    assert chart is not None
    assert "Left out: qlora. It needs <a card>." in chart.summary  # the page escapes it
    assert chart.table.rows[-1][0] == "qlora"
    assert "It needs <a card>." in chart.table.rows[-1][-1]


def test_the_form_of_each_methods_states_is_its_own() -> None:
    chart = methods_chart(several_methods())
    assert chart is not None
    states = {row[0]: row[4].partition(" = ")[2] for row in chart.table.rows}
    assert states == {"badam": "2M+16M/D", "lora": "2M+16T", "adam": "18M"}


def test_one_method_alone_is_not_compared() -> None:
    assert methods_chart(factories.search_result()) is None


def test_a_bar_that_would_squeeze_the_others_is_cut() -> None:
    chart = methods_chart(several_methods())
    assert chart is not None
    assert 46 <= chart.layout["xaxis"]["range"][1] < 60


def test_device_parts_say_what_is_outside_of_tensors() -> None:
    parts = device_parts(factories.candidate())
    assert parts[Category.CACHE] == GIB
    assert parts[Category.CONTEXT] == GIB
    assert sum(parts.values()) == 22 * GIB


def test_sizes_are_coloured_and_worded_alike() -> None:
    chart = sizes_chart(sizes())
    heatmap, *legend = chart.traces
    assert (heatmap["x"], heatmap["y"]) == (["512", "1024"], ["1", "2"])
    assert heatmap["z"] == [[0, 0], [1, 2]]
    assert heatmap["text"] == [["12.0", "20.0"], ["15.0", "✗"]]
    assert [trace["name"] for trace in legend] == ["fits", "fits with checkpointing", "does not fit"]
    colours = [colour for _, colour in heatmap["colorscale"]]
    assert colours == [trace["marker"]["color"] for trace in legend for _ in (0, 1)]
    assert "checkpointing all, chunked loss" in heatmap["hovertext"][1][0]
    assert "3 of 4 sizes fit" in chart.summary
    assert chart.table.rows[-1] == ("2", "1024", "-", "-", "does not fit")


def test_the_page_of_a_plan_holds_both() -> None:
    page = plan_page(factories.plan(), result=several_methods(), sizes=sizes())
    assert {"partitions", "methods", "sizes"} <= {chart.identity for chart in page.charts}

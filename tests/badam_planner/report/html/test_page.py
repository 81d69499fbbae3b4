from __future__ import annotations

import base64
import gzip
from pathlib import Path

import pytest
from plotly import graph_objects
from plotly.offline import get_plotlyjs

from badam.errors import InputError
from badam.units import GIB
from badam_planner.accuracy.compare import compare, summarize
from badam_planner.report.html.page import Page, render_page
from badam_planner.report.html.pages import accuracy_page, comparison_page, plan_page, write_plan_html
from tests.badam_planner import factories
from tests.badam_planner.report.html.pages import (
    HOSTILE,
    Seen,
    comparison,
    curve,
    full_comparison_page,
    full_plan_page,
    step_timeline,
)

MEGABYTE = 10**6


def pages() -> list[Page]:
    return [full_plan_page(), full_comparison_page(), accuracy_page(summarize([comparison(), comparison()]))]


@pytest.mark.parametrize("page", pages(), ids=["plan", "comparison", "accuracy"])
def test_page_is_a_document_with_landmarks_and_a_heading_for_every_section(page: Page) -> None:
    seen = Seen.of(render_page(page))
    assert seen.all("html") == [{"lang": "en"}]
    assert [len(seen.all(tag)) for tag in ("h1", "header", "main", "nav", "footer")] == [1, 1, 1, 1, 1]
    identities = [attributes["id"] for _, attributes in seen.elements if "id" in attributes]
    assert len(identities) == len(set(identities))
    for section in seen.all("section"):
        assert section["aria-labelledby"] in identities
    links = {attributes["href"].removeprefix("#") for attributes in seen.all("a")}
    assert links <= set(identities)


@pytest.mark.parametrize("page", pages(), ids=["plan", "comparison", "accuracy"])
def test_every_chart_is_named_described_and_repeated_as_a_table(page: Page) -> None:
    seen = Seen.of(render_page(page))
    places = [attributes for attributes in seen.all("div") if attributes.get("class") == "chart"]
    assert [place["id"] for place in places] == [f"plot-{chart.identity}" for chart in page.charts]
    identities = {attributes.get("id") for _, attributes in seen.elements}
    for place in places:
        assert set(place["aria-labelledby"].split()) <= identities
    assert len(seen.all("details")) == len(page.charts)
    assert len(seen.all("table")) == len(page.charts) + len(page.tables)
    assert all(header["scope"] in ("col", "row") for header in seen.all("th"))
    for chart in page.charts:
        assert all(len(row) == len(chart.table.columns) for row in chart.table.rows)
        assert chart.summary.endswith(".")


def test_page_loads_nothing_from_elsewhere() -> None:
    text = render_page(full_comparison_page())
    seen = Seen.of(text)
    for _, attributes in seen.elements:
        assert not attributes.get("src")
        assert attributes.get("href", "#").startswith("#")
    assert "default-src 'none'" in text
    assert "connect-src" not in text


def test_plotly_is_inside_once_and_whole() -> None:
    seen = Seen.of(render_page(full_plan_page()))
    (packed,) = (text for attributes, text in seen.scripts if attributes.get("id") == "library")
    library = gzip.decompress(base64.b64decode(packed)).decode()
    assert library == get_plotlyjs()


def test_a_page_takes_at_most_two_and_a_half_megabytes() -> None:
    assert len(render_page(full_comparison_page()).encode()) <= 2.5 * MEGABYTE


@pytest.mark.parametrize("page", pages(), ids=["plan", "comparison", "accuracy"])
def test_plotly_knows_every_property_of_every_chart(page: Page) -> None:
    for chart in page.charts:
        figure = graph_objects.Figure(data=chart.traces, layout=chart.layout)  # raises on a name or value it lacks
        assert len(figure.data) == len(chart.traces)


def test_a_page_about_a_large_model_stays_small() -> None:
    name = "model.layers.125.self_attn.some_projection_with_a_long_name"
    blocks = tuple(factories.block_plans(1)[0].model_copy(update={"name": f"{name}.{index}"}) for index in range(1000))
    seen = tuple(
        factories.block_measurements(1)[0].model_copy(update={"name": f"{name}.{index}"}) for index in range(1000)
    )
    plan = factories.plan(blocks=blocks)
    run = factories.measured_run(plan, measurement={"blocks": seen})
    page = comparison_page(compare(plan, run), timeline=step_timeline(name), curve=curve(name))
    assert len(render_page(page).encode()) < 5 * MEGABYTE


def test_names_are_escaped_in_the_page_and_in_the_figures() -> None:
    text = render_page(full_comparison_page(HOSTILE))
    seen = Seen.of(text)
    assert len(seen.all("script")) == 3
    assert seen.all("img") == []
    (figures,) = (text for attributes, text in seen.scripts if attributes.get("id") == "figures")
    assert "<" not in figures
    assert any(HOSTILE in words for words in seen.words)
    for figure in seen.figures():
        assert "<script" not in str(figure)
        assert "<img" not in str(figure)


def test_verdict_is_said_in_words() -> None:
    yes, no = factories.plan(), factories.plan(prediction={"peak_device_bytes": 25 * GIB})
    assert (plan_page(yes).passed, plan_page(no).passed) == (True, False)
    assert "1.00 GiB to spare" in plan_page(yes).verdict
    assert "2.00 GiB too much" in plan_page(no).verdict
    assert "Yes. " in render_page(plan_page(yes))
    assert "No. " in render_page(plan_page(no))


def test_a_plan_without_prediction_has_no_report() -> None:
    with pytest.raises(InputError, match="no prediction"):
        plan_page(factories.plan().model_copy(update={"prediction": None}))


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_plan_html(factories.plan(), tmp_path / "plan.html")
    assert (tmp_path / "plan.html").read_text().endswith("</html>\n")
    with pytest.raises(InputError, match="Cannot write"):
        write_plan_html(factories.plan(), tmp_path / "absent" / "plan.html")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.html"]

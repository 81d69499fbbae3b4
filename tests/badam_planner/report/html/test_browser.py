from __future__ import annotations

from pathlib import Path

import pytest

from badam_planner.report.html.page import write_page
from tests.badam_planner.report.html.browser import CHROMIUM, visit
from tests.badam_planner.report.html.pages import HOSTILE, full_comparison_page, full_plan_page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
]

STATE = """
return {
  charts: document.documentElement.dataset.charts,
  drawn: [...document.querySelectorAll(".chart")].map((place) => place.querySelectorAll(".main-svg").length > 0),
  errors: document.querySelectorAll(".plotly-notifier").length,
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  ink: getComputedStyle(document.body).color,
  axis: getComputedStyle(document.querySelector(".xtick text")).fill,
  buttons: [...document.querySelectorAll(".modebar-btn")].map((button) => button.dataset.title),
  hacked: window.hacked || 0,
};
"""


@pytest.fixture
def report(tmp_path: Path) -> Path:
    write_page(full_comparison_page(), tmp_path / "report.html")
    return tmp_path / "report.html"


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_all_charts_are_drawn_without_a_word_on_the_console(report: Path, width: int, dark: bool) -> None:
    seen = visit(report, STATE, width=width, dark=dark)
    assert seen.console == ()
    assert seen.answer["charts"] == str(len(full_comparison_page().charts))
    assert all(seen.answer["drawn"])
    assert seen.answer["errors"] == 0
    assert seen.answer["wide"] <= 0
    assert seen.answer["axis"] == seen.answer["ink"]
    assert seen.answer["ink"] == ("rgb(230, 233, 238)" if dark else "rgb(27, 31, 36)")


@pytest.mark.parametrize("width", [360, 1200])
def test_words_below_an_axis_are_level_and_clear_of_its_title_and_the_legend(tmp_path: Path, width: int) -> None:
    write_page(full_comparison_page(), tmp_path / "report.html")
    write_page(full_plan_page(), tmp_path / "plan.html")
    script = """
    const clashes = [];
    for (const place of document.querySelectorAll(".chart")) {
      const boxes = (query) => [...place.querySelectorAll(query)].map((one) => one.getBoundingClientRect());
      const rows = {ticks: boxes(".xtick text"), title: boxes(".xtitle"), legend: boxes(".legend")};
      const bottom = (row) => Math.max(...rows[row].map((box) => box.bottom));
      for (const [above, below] of [["ticks", "title"], ["ticks", "legend"], ["title", "legend"]]) {
        if (rows[above].length && rows[below].length && bottom(above) > rows[below][0].top + 2)
          clashes.push(`${place.id}: ${above} in ${below}`);
      }
      for (const box of rows.title) if (box.right > innerWidth) clashes.push(`${place.id}: title beyond the edge`);
    }
    return clashes;
    """
    for name in ("report.html", "plan.html"):
        assert visit(tmp_path / name, script, width=width).answer == []


def test_no_button_sends_a_chart_anywhere(report: Path) -> None:
    assert set(visit(report, STATE).answer["buttons"]) == {"Download plot as a PNG", "Zoom", "Pan", "Reset axes"}


def test_plan_page_is_drawn(tmp_path: Path) -> None:
    write_page(full_plan_page(), tmp_path / "plan.html")
    seen = visit(tmp_path / "plan.html", STATE)
    assert (seen.answer["charts"], seen.console) == ("6", ())
    assert all(seen.answer["drawn"])
    assert seen.answer["wide"] <= 0


# Moves the mouse over a point of a chart, as a person would, and reads what appears beside it.
HOVER = """
const place = document.getElementById("plot-%s");
const {xaxis, yaxis} = place._fullLayout;
const area = place.querySelector(".nsewdrag").getBoundingClientRect();
const at = {
  clientX: area.left + xaxis.l2p(%s), clientY: area.top + yaxis.l2p(%s), bubbles: true,
};
for (const kind of ["mouseover", "mousemove"]) {
  place.querySelector(".nsewdrag").dispatchEvent(new MouseEvent(kind, at));
  await pause(300);
}
return place.querySelector(".hoverlayer").textContent;
"""


def test_hovering_over_the_timeline_names_phase_module_and_tensor(report: Path) -> None:
    text = visit(report, HOVER % ("timeline", 2, 14)).answer
    assert "14.00 GiB in backward" in text
    assert "acme/tiny-7b: mm" in text  # the name that the page under test gives its module


def test_hovering_over_a_measured_step_names_the_module_and_its_memory(report: Path) -> None:
    script = HOVER.replace("{xaxis, yaxis}", "{xaxis, yaxis2: yaxis}").replace(
        ".nsewdrag", ".nsewdrag[data-subplot=xy2]"
    )
    text = visit(report, script % ("modules", 2.5, 1)).answer
    assert "acme/tiny-7b" in text  # the name that the page under test gives its module
    assert "forward, 3.0 ms" in text
    assert "11.00 GiB before, 12.00 GiB after" in text
    assert "highest 14.00 GiB" in text


def test_hovering_over_a_method_and_a_size_says_what_is_there(tmp_path: Path) -> None:
    write_page(full_plan_page(), tmp_path / "plan.html")
    assert "parameter" in visit(tmp_path / "plan.html", HOVER % ("methods", 3, 0)).answer
    assert "15.00 GiB on the device" in visit(tmp_path / "plan.html", HOVER % ("sizes", 0, 1)).answer


def test_clicking_the_legend_hides_a_trace(report: Path) -> None:
    script = """
    const place = document.getElementById("plot-parts");
    const toggle = place.querySelector(".legendtoggle");
    const box = toggle.getBoundingClientRect();
    const at = {clientX: box.left + 5, clientY: box.top + 5, bubbles: true};
    for (const kind of ["mousedown", "mouseup"]) toggle.dispatchEvent(new MouseEvent(kind, at));
    await pause(1000);
    return place.data.map((trace) => trace.visible ?? true);
    """
    assert visit(report, script).answer == ["legendonly", True]


def test_charts_are_drawn_as_they_come_into_sight_and_all_of_them_for_paper(report: Path) -> None:
    script = """
    const places = [...document.querySelectorAll(".chart")];
    const drawn = () => places.map((place) => place.querySelector(".main-svg") !== null);
    const states = [drawn()];
    document.querySelector("#loss").scrollIntoView();
    for (let turn = 0; turn < 300 && !drawn().at(-1); turn++) await pause(50);
    states.push(drawn());
    dispatchEvent(new Event("beforeprint"));
    states.push(drawn());
    return states;
    """
    first, scrolled, printed = visit(report, script, height=1500).answer
    assert first[0]
    assert not first[-1]
    assert scrolled[-1]
    assert not all(scrolled)
    assert all(printed)


def test_printing_is_light_and_as_wide_as_paper(report: Path) -> None:
    script = """
    dispatchEvent(new Event("beforeprint"));
    await pause(500);
    const place = document.getElementById("plot-parts");
    const printed = [place.layout.width, getComputedStyle(document.body).color];
    dispatchEvent(new Event("afterprint"));
    await pause(500);
    return [...printed, place.layout.width ?? null, getComputedStyle(document.body).color];
    """
    answer = visit(report, script, dark=True).answer
    assert answer[:2] == [680, "rgb(27, 31, 36)"]
    assert answer[3] == "rgb(230, 233, 238)"


def test_hostile_names_are_only_shown(tmp_path: Path) -> None:
    write_page(full_comparison_page(HOSTILE), tmp_path / "hostile.html")
    seen = visit(tmp_path / "hostile.html", STATE)
    assert seen.answer["hacked"] == 0
    assert all(seen.answer["drawn"])
    assert seen.console == ()


def test_a_browser_that_cannot_unpack_shows_the_tables(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    report.write_text(text.replace("<head>", "<head><script>delete window.DecompressionStream</script>"))
    script = """
    return [document.documentElement.dataset.charts,
            [...document.querySelectorAll("details")].every((one) => one.open)];
    """
    assert visit(report, script).answer == ["none", True]

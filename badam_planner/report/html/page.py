"""From charts and facts to one self-contained HTML page. Every text from outside is escaped here."""

from __future__ import annotations

import base64
import gzip
import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from badam.files import write_file
from badam_planner.report.html.chart import Chart, TableData
from badam_planner.report.text import clean

# Nothing is loaded and nothing is sent, whatever a name in a plan contains.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)


@dataclass(frozen=True, slots=True)
class Page:
    """What one report says, in the order in which it is read."""

    title: str
    lead: str
    passed: bool | None  # None where there is nothing to judge
    verdict: str
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    tables: tuple[tuple[str, TableData], ...]  # title and content
    charts: tuple[Chart, ...]
    footer: str


def render_page(page: Page) -> str:
    """The page as HTML text, with plotly inside it once."""
    # "</script" would end its element early; JSON may write the bracket in another way that means the same.
    figures = json.dumps([_figure(chart) for chart in page.charts], ensure_ascii=False, separators=(",", ":"))
    return _template().render(
        page=page,
        policy=Markup(POLICY),
        style=Markup(_file("page.css")),
        script=Markup(_file("page.js")),
        figures=Markup(figures.replace("<", "\\u003c")),
        library=Markup(_library()),
    )


def write_page(page: Page, path: Path) -> None:
    """Write the page.

    Raises:
        InputError: if the file cannot be written.
    """
    write_file(path, render_page(page))


@cache
def _template() -> Template:
    """The page's template. Whatever text it is given loses its control characters, and then is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_cleaned, keep_trailing_newline=True)
    return environment.from_string(_file("page.html.jinja"))


def _cleaned(value: object) -> object:
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


@cache
def _library() -> str:
    """plotly.js as the Python package of plotly brings it, compressed, as text."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def _figure(chart: Chart) -> dict[str, object]:
    return {"identity": chart.identity, "traces": chart.traces, "layout": chart.layout, "height": chart.height}

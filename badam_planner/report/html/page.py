"""From charts and facts to one self-contained HTML page. Every text from outside is escaped here."""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from badam.errors import InputError
from badam_planner.report.html.assets import SCRIPT, STYLE
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
    figures = figures.replace("<", "\\u003c")
    return "".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n',
            f"<title>{_text(page.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n",
            *_body(page),
            f'<script type="text/plain" id="library">{_library()}</script>\n',
            f'<script type="application/json" id="figures">{figures}</script>\n',
            f"<script>{SCRIPT}</script>\n</body>\n</html>\n",
        )
    )


def write_page(page: Page, path: Path) -> None:
    """Write the page whole or not at all.

    Raises:
        InputError: if the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(render_page(page), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"Cannot write {path}: {error.strerror or error}.", advice="Choose another path.") from error


@cache
def _library() -> str:
    """plotly.js, compressed, as text.

    Its cartesian edition has the kinds of traces that are drawn here, in a third of the whole, and a browser reads it
    in a third of the time. The Python package of plotly holds the whole only, so this one is kept beside the code,
    under plotly's license; to renew it: ``npm pack plotly.js-cartesian-dist-min``, then ``gzip -9n``.
    """
    packed = resources.files("badam_planner.report.html").joinpath("plotly-cartesian.min.js.gz").read_bytes()
    return base64.b64encode(packed).decode()


def _body(page: Page) -> Iterable[str]:
    yield '<a class="skip" href="#main">Skip to the report</a>\n<header>\n'
    yield f"<h1>{_text(page.title)}</h1>\n<p>{_text(page.lead)}</p>\n"
    if page.verdict:
        kind, word = {True: ("pass", "Yes. "), False: ("fail", "No. "), None: ("", "")}[page.passed]
        yield f'<p class="verdict {kind}" role="status"><strong>{word}</strong>{_text(page.verdict)}</p>\n'
    yield "</header>\n"
    sections = [("summary", "Summary"), *((chart.identity, chart.title) for chart in page.charts)]
    links = "".join(f'<li><a href="#{identity}">{_text(title)}</a></li>' for identity, title in sections)
    yield f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main id="main">\n'
    yield "<noscript><p>The charts need JavaScript; their figures are in the tables.</p></noscript>\n"
    yield from _summary(page)
    for chart in page.charts:
        yield from _section(chart)
    yield f"</main>\n<footer>{_text(page.footer)}</footer>\n"


def _summary(page: Page) -> Iterable[str]:
    yield '<section id="summary" aria-labelledby="summary-title">\n<h2 id="summary-title">Summary</h2>\n<dl>'
    yield from (f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in page.facts)
    yield "</dl>\n"
    if page.notes:
        yield f"<ul>{''.join(f'<li>{_text(note)}</li>' for note in page.notes)}</ul>\n"
    for title, table in page.tables:
        yield _table(title, table)
    yield "</section>\n"


def _section(chart: Chart) -> Iterable[str]:
    title, identity = _text(chart.title), chart.identity
    yield f'<section id="{identity}" aria-labelledby="{identity}-title">\n<h2 id="{identity}-title">{title}</h2>\n'
    yield f'<figure><figcaption id="{identity}-summary">{_text(chart.summary)}</figcaption>'
    yield f'<div class="chart" id="plot-{identity}" role="group" aria-roledescription="chart" '
    yield f'aria-labelledby="{identity}-title {identity}-summary" style="height:{chart.height}px"></div></figure>\n'
    yield f"<details><summary>The same as a table</summary>{_table(chart.title, chart.table)}</details>\n</section>\n"


def _table(title: str, table: TableData) -> str:
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in table.columns)
    return (
        f'<div class="scroll" role="region" aria-label="{_text(title)}, table" tabindex="0"><table>'
        f"<caption>{_text(title)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(map(_row, table.rows))}</tbody></table></div>\n"
    )


def _row(cells: Sequence[str]) -> str:
    rest = "".join(f"<td>{_text(cell)}</td>" for cell in cells[1:])
    return f'<tr><th scope="row">{_text(cells[0])}</th>{rest}</tr>'


def _figure(chart: Chart) -> dict[str, object]:
    return {"identity": chart.identity, "traces": chart.traces, "layout": chart.layout, "height": chart.height}


def _text(text: str) -> str:
    return html.escape(clean(text))

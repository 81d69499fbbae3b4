"""What a chart is to the page: a plotly figure as plain data, one sentence that says it, and the same as a table."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from badam.units import GIB, KIB, MIB, format_bytes
from badam.vocabulary import Category
from badam_planner.report.terminal.bars import FILLS
from badam_planner.report.text import clean, shorten

PREDICTED_COLOUR, MEASURED_COLOUR = "#0072b2", "#d55e00"
PATTERNS = ("", "/", "x", "\\", ".", "-", "|", "+")
"""Hatchings beside the colours, so that no part is told by its colour alone."""


@dataclass(frozen=True, slots=True)
class TableData:
    """A table as text; the first column names the row."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure. ``traces`` and ``layout`` are plotly's, with every name in them already escaped."""

    identity: str
    title: str
    summary: str  # what a reader who does not see the chart must know
    traces: tuple[dict[str, Any], ...]
    layout: dict[str, Any]
    table: TableData
    height: int = 420


@dataclass(frozen=True, slots=True)
class Scale:
    """The unit of an axis."""

    unit: str
    factor: int

    def __call__(self, size: int) -> float:
        """``size`` bytes on the axis, to five significant digits: finer than a pixel, and short in the file."""
        return float(f"{size / self.factor:.5g}")


def scale_for(largest: int) -> Scale:
    """The unit in which ``largest`` bytes are a number that one likes to read."""
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if largest >= factor:
            return Scale(unit, factor)
    return Scale("B", 1)


def escaped(name: str) -> str:
    """``name`` for plotly, which reads a subset of HTML in every label."""
    return html.escape(clean(name), quote=False)


def category_style(category: Category) -> tuple[str, str]:
    """The colour and hatching of a category, the same in every chart."""
    return FILLS[category].colour, PATTERNS[list(Category).index(category) % len(PATTERNS)]


def filled(colour: str | Sequence[str], shape: str | Sequence[str]) -> dict[str, Any]:
    """The marker of bars with a hatching over their colour; one of each for all bars, or for each bar its own."""
    # plotly's own way to hatch over a colour warns on the console where colours come as a list.
    over = {"shape": shape, "bgcolor": colour, "fgcolor": "#1b1f24", "fgopacity": 0.5, "size": 6, "solidity": 0.25}
    return {"color": colour, "pattern": over}


def block_axis(names: Sequence[str], most_ticks: int = 16) -> dict[str, Any]:
    """A horizontal axis with one place per block; the path that they lie in is said once, in its title.

    The embedding and the head lie in no path, and are called by their names beside the others.
    """
    shared = _shared_path([name for name in names if "." in name])
    labels = [name[len(shared) + 1 :] if shared and name.startswith(f"{shared}.") else name for name in names]
    step = max(1, -(-len(names) // most_ticks))
    places = range(0, len(names), step)
    return {
        "title": {"text": f"block in {escaped(shared)}" if shared else "block"},
        "range": [-0.6, len(names) - 0.4],
        "tickvals": list(places),
        "ticktext": [escaped(shorten(labels[place], 18)) for place in places],
    }


def _shared_path(names: Sequence[str]) -> str:
    """The module path that all ``names`` lie in; "" if there is none, or a single name."""
    if len(names) < 2:
        return ""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))


def limit_line(limit_bytes: int, scale: Scale, *, vertical: bool = False) -> dict[str, Any]:
    """A dashed line over the whole chart at the card's limit; the page gives it the colour of the text."""
    at = scale(limit_bytes)
    along, across = ("x", "y") if vertical else ("y", "x")
    return {
        "type": "line",
        f"{across}ref": "paper",
        f"{across}0": 0,
        f"{across}1": 1,
        f"{along}ref": along,
        f"{along}0": at,
        f"{along}1": at,
        "line": {"dash": "dash", "width": 2},
        "label": {
            "text": f"limit {format_bytes(limit_bytes)}",
            "textposition": "end",
            "yanchor": "bottom",
            **({"xanchor": "right"} if vertical else {}),  # else it would stand half outside
        },
    }


def headroom(largest: int, limit_bytes: int, scale: Scale, share: float = 0.2) -> list[float]:
    """An axis from zero to ``share`` above whatever is drawn, so that there is room for words."""
    return [0, scale(max(largest, limit_bytes if within_sight(limit_bytes, largest) else 0)) * (1 + share)]


def within_sight(limit_bytes: int, largest: int) -> bool:
    """Whether a limit may be drawn without squeezing what is drawn into a corner."""
    return limit_bytes <= 2 * largest

"""Stacked bars of memory as lines of text: told apart by fill character first and by colour second."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from badam.units import format_bytes
from badam.vocabulary import Category
from badam_planner.report.text import unit_for

UNSPLIT = "not split"
"""The part of a phase's memory that no record tells apart."""


@dataclass(frozen=True, slots=True)
class Fill:
    """How one part is drawn: a block character, a letter where the terminal has no such character, and a colour."""

    glyph: str
    letter: str
    colour: str


# Colours from the palettes of Okabe and Ito and of Tol, which people with any common colour deficiency can tell apart.
FILLS: Mapping[str, Fill] = {
    Category.PARAMETER: Fill("█", "P", "#0072b2"),
    Category.MASTER: Fill("▓", "M", "#56b4e9"),
    Category.GRADIENT: Fill("▚", "G", "#d55e00"),
    Category.OPTIMIZER_STATE: Fill("▒", "O", "#e69f00"),
    Category.ACTIVATION: Fill("░", "A", "#009e73"),
    Category.LOGITS: Fill("▞", "L", "#aa4499"),
    Category.TEMPORARY: Fill("▤", "T", "#999933"),
    Category.WORKSPACE: Fill("▥", "W", "#777777"),
    Category.CONTEXT: Fill("▦", "C", "#555555"),
    Category.CACHE: Fill("▧", "R", "#bbbbbb"),
    UNSPLIT: Fill("━", "=", "#999999"),
}


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: its parts in drawing order, in bytes, and the words around it."""

    label: str
    side: str
    parts: tuple[tuple[str, int], ...]
    remark: str = ""

    @property
    def total_bytes(self) -> int:
        return sum(size for _, size in self.parts)


@dataclass(frozen=True, slots=True)
class StackedBars:
    """Several bars on one scale, with the card's limit marked.

    A limit more than twice as far as the longest bar would squeeze the bars into a corner; then the scale ends at the
    longest bar and the limit is only named.
    """

    bars: Sequence[Bar]
    limit_bytes: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        ascii_only = options.ascii_only
        label_width = max(len(bar.label) for bar in self.bars)
        side_width = max(len(bar.side) for bar in self.bars)
        longest = max(bar.total_bytes for bar in self.bars)
        unit = unit_for(longest)
        value_width = max(len(unit.number(bar.total_bytes)) for bar in self.bars)
        remark_width = max(len(bar.remark) for bar in self.bars)
        width = options.max_width - label_width - side_width - value_width - remark_width - 4
        shown_limit = self.limit_bytes if self.limit_bytes <= 2 * longest else None
        scale = max(longest, shown_limit or 0, 1)
        for bar in self.bars:
            line = Text(no_wrap=True, overflow="crop")
            line.append(f"{bar.label:<{label_width}} {bar.side:<{side_width}} ")
            line.append_text(_draw(bar, max(width, 10), scale, shown_limit, ascii_only))
            line.append(f" {unit.number(bar.total_bytes):>{value_width}}")
            line.append(f" {bar.remark}".rstrip(), style="bold")
            yield line
        yield _legend(self.bars, ascii_only)
        limit = format_bytes(self.limit_bytes)
        mark = "|" if ascii_only else "│"
        where = f"{mark} marks the limit, {limit}" if shown_limit else f"the limit is {limit}"
        yield Text(f"{unit.name} of tensors; {where}.")


def _draw(bar: Bar, width: int, scale: int, limit: int | None, ascii_only: bool) -> Text:
    cells: list[tuple[str, str]] = []
    reached = 0
    for name, size in bar.parts:
        reached += size
        fill = FILLS[name]
        # The running sum is rounded, not each part, so that a bar's length never depends on how it is split.
        until = round(reached * (width - 1) / scale)
        cells.extend([(fill.letter if ascii_only else fill.glyph, fill.colour)] * (until - len(cells)))
    cells.extend([(" ", "")] * (width - len(cells)))
    if limit is not None:
        cells[round(limit * (width - 1) / scale)] = ("|" if ascii_only else "│", "bold")
    line = Text()
    for glyph, style in cells:
        line.append(glyph, style=style)
    return line


def _legend(bars: Iterable[Bar], ascii_only: bool) -> Text:
    used = {name for bar in bars for name, size in bar.parts if size}
    legend = Text()
    for name, fill in FILLS.items():
        if name in used:
            legend.append("  " if legend else "")
            legend.append(fill.letter if ascii_only else fill.glyph, style=fill.colour)
            legend.append(f" {name}")
    return legend

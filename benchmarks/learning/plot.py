"""Three panels of one SVG: held-out loss against tokens, against time, against peak memory. Text in, text out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 1080, 420
PANEL_WIDTH, PANEL_HEIGHT, LEFT, TOP, GAP = 280, 300, 60, 40, 50
LEGEND_TOP = TOP + PANEL_HEIGHT + 50
COLOURS = {
    "adam": "#111111", "badam, layers": "#0b5fb4", "badam, attn-mlp": "#4a90d9", "badam, matrices": "#9cc4ee",
    "badam-ratio": "#00897b", "lora": "#d81b60", "galore": "#f4511e", "lisa": "#8e24aa", "hift": "#6d4c41",
    "lomo": "#c0a000", "adalomo": "#7cb342", "mezo": "#9e9e9e",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Series:
    """One contestant's line in the first two panels, and its dot in the third."""

    name: str
    tokens: tuple[float, ...]  # thousands
    seconds: tuple[float, ...]
    losses: tuple[float, ...]
    peak_mib: float


@dataclass(frozen=True, slots=True)
class Axis:
    """A range in data and where it lies on the page."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Where a value lies."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Four to eight round numbers within the range."""
        span = self.high - self.low
        step = 10.0 ** math.floor(math.log10(span / 4))
        step = next(step * factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 8)
        first = math.ceil(self.low / step)
        return [round(index * step, 10) for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def render(series: Sequence[Series]) -> str:
    """The picture of a contest."""
    losses = [loss for each in series for loss in each.losses]
    margin = 0.05 * (max(losses) - min(losses))
    low, high = min(losses) - margin, max(losses) + margin
    panels = [
        ("thousand tokens", 0.0, max(each.tokens[-1] for each in series)),
        ("processor seconds", 0.0, max(each.seconds[-1] for each in series)),
        ("peak memory, MiB", 0.0, 1.05 * max(each.peak_mib for each in series)),
    ]
    parts = []
    for number, (title, first, last) in enumerate(panels):
        left = LEFT + number * (PANEL_WIDTH + GAP)
        across = Axis(first, last, left, left + PANEL_WIDTH)
        up = Axis(low, high, TOP + PANEL_HEIGHT, TOP)
        parts += _frame(title, across, up, labelled=number == 0)
        for each in series:
            if number == 2:
                parts.append(_dot(across.at(each.peak_mib), up.at(each.losses[-1]), each.name))
            else:
                places = each.tokens if number == 0 else each.seconds
                parts.append(
                    _line([(across.at(x), up.at(y)) for x, y in zip(places, each.losses, strict=True)], each.name)
                )
    parts += _legend([each.name for each in series])
    style = "font-family='sans-serif' font-size='12' fill='#333'"
    body = "\n".join(parts)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' {style}>\n"
        f"<rect width='{WIDTH}' height='{HEIGHT}' fill='white'/>\n{body}\n</svg>\n"
    )


def _frame(title: str, across: Axis, up: Axis, *, labelled: bool) -> list[str]:
    parts = []
    for tick in across.ticks:
        x = across.at(tick)
        parts.append(f"<path d='M{x:.1f} {up.end}V{up.start}' stroke='#eee'/>")
        parts.append(f"<text x='{x:.1f}' y='{up.start + 16}' text-anchor='middle'>{tick:g}</text>")
    for tick in up.ticks:
        y = up.at(tick)
        parts.append(f"<path d='M{across.start} {y:.1f}H{across.end}' stroke='#eee'/>")
        parts.append(f"<text x='{across.start - 6}' y='{y + 4:.1f}' text-anchor='end'>{tick:g}</text>")
    middle = (across.start + across.end) / 2
    parts.append(f"<text x='{middle}' y='{up.start + 34}' text-anchor='middle'>{escape(title)}</text>")
    if labelled:
        parts.append(f"<text x='{across.start}' y='{up.end - 14}'>held-out loss per token</text>")
    return parts


def _line(points: Sequence[tuple[float, float]], name: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f"<polyline points='{path}' fill='none' stroke='{COLOURS[name]}' stroke-width='2'>"
        f"<title>{escape(name)}</title></polyline>"
    )


def _dot(x: float, y: float, name: str) -> str:
    return f"<circle cx='{x:.1f}' cy='{y:.1f}' r='5' fill='{COLOURS[name]}'><title>{escape(name)}</title></circle>"


def _legend(names: Sequence[str]) -> list[str]:
    parts = []
    for index, name in enumerate(names):
        x, y = LEFT + index % 8 * 125, LEGEND_TOP + index // 8 * 18
        parts.append(f"<rect x='{x}' y='{y - 9}' width='10' height='10' fill='{COLOURS[name]}'/>")
        parts.append(f"<text x='{x + 15}' y='{y}'>{escape(name)}</text>")
    return parts

"""Charts of memory: one step's timeline, what the peak is made of, the phases, the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from badam.plan import Plan, Prediction
from badam.units import format_bytes
from badam.vocabulary import Category
from badam_planner.accuracy.compare import predicted_parts
from badam_planner.accuracy.comparison import NOT_ATTRIBUTED, BlockRow, Comparison, Pair
from badam_planner.report.html.chart import (
    MEASURED_COLOUR,
    PREDICTED_COLOUR,
    Chart,
    Scale,
    TableData,
    block_axis,
    category_style,
    escaped,
    filled,
    headroom,
    limit_line,
    scale_for,
    within_sight,
)
from badam_planner.report.html.model import Sample, StepTimeline
from badam_planner.report.text import bytes_or_nothing, clean, error_percent, signed_bytes

UNATTRIBUTED = ("#999999", "")


def timeline_chart(timeline: StepTimeline) -> Chart:
    """One training step, event by event: categories stacked, phases shaded, the limit marked."""
    samples = timeline.samples
    peak = max(samples, key=lambda sample: sample.total_bytes)
    scale = scale_for(peak.total_bytes)
    ticks = [sample.tick for sample in samples]
    shown = [category for category in Category if any(sample.by_category.get(category) for sample in samples)]
    traces: list[dict[str, Any]] = []
    for category in shown:
        colour, _ = category_style(category)
        traces.append(
            {
                "type": "scatter",
                "name": category.value,
                "x": ticks,
                "y": [scale(sample.by_category.get(category, 0)) for sample in samples],
                "stackgroup": "memory",
                "line": {"shape": "hv", "width": 0.5, "color": colour},
                "fillcolor": colour,
                "hoverinfo": "skip",
            }
        )
    traces.append(
        {
            "type": "scatter",
            "mode": "lines",
            "name": "total",
            "x": ticks,
            "y": [scale(sample.total_bytes) for sample in samples],
            "line": {"shape": "hv", "width": 1.5},
            "meta": "ink",
            "text": [_event_in_words(sample) for sample in samples],
            "hovertemplate": "%{text}<extra></extra>",
        }
    )
    along = (peak.tick - ticks[0]) / max(1, ticks[-1] - ticks[0])
    limit = timeline.limit_bytes
    shapes = [limit_line(limit, scale)] if within_sight(limit, peak.total_bytes) else []
    layout = {
        "xaxis": {"title": {"text": "allocations and releases, in order"}},
        "yaxis": {
            "title": {"text": f"live memory ({scale.unit})"},
            "range": headroom(peak.total_bytes, limit, scale, 0.35),  # for the peak's words, and above them the phases'
        },
        "hovermode": "x",
        "shapes": [*_phase_bands(timeline), *shapes],
        "annotations": [_marker(peak.tick, scale(peak.total_bytes), f"peak {format_bytes(peak.total_bytes)}", along)],
    }
    rows = tuple(
        (span.phase.value, format_bytes(span.peak_bytes), clean(span.module) or "outside the modules")
        for span in timeline.spans
    )
    summary = (
        f"{clean(timeline.title)}: live tensors reach {format_bytes(peak.total_bytes)}, in {peak.phase}"
        f"{f', module {clean(peak.module)}' if peak.module else ''}. The allocator's rounding and workspaces "
        f"come on top. The limit is {format_bytes(limit)}."
    )
    table = TableData(("phase", "peak within", "module at the peak"), rows)
    return Chart("timeline", "One step, allocation by allocation", summary, tuple(traces), layout, table, 480)


def parts_chart(prediction: Prediction, comparison: Comparison | None) -> Chart:
    """What the peak is made of: predicted in full detail, or beside what a run could tell apart."""
    if comparison is None:
        sizes = predicted_parts(prediction)
        scale = scale_for(max(sizes.values(), default=0))
        styles = [UNATTRIBUTED if name == NOT_ATTRIBUTED else category_style(Category(name)) for name in sizes]
        bars = _bars("predicted", list(sizes), list(sizes.values()), scale, PREDICTED_COLOUR)
        bars["marker"] = filled([style[0] for style in styles], [style[1] for style in styles])
        traces: tuple[dict[str, Any], ...] = (bars,)
        rows = [(name, format_bytes(size)) for name, size in sizes.items()]
        table = TableData(("part", "predicted"), (*rows, ("sum", format_bytes(prediction.peak_allocated_bytes))))
        largest = max(sizes, key=lambda name: sizes[name], default="")
        summary = f"The largest part of the peak is {largest}, {format_bytes(sizes.get(largest, 0))}."
    else:
        named = [(row.name, row.memory) for row in comparison.categories]
        scale = scale_for(max((max(pair.predicted or 0, pair.measured or 0) for _, pair in named), default=0))
        traces = _pair_bars([name for name, _ in named], [pair for _, pair in named], scale)
        table = _pair_table("part", [*named, ("sum", comparison.allocated)])
        summary = (
            f"The parts sum to {bytes_or_nothing(comparison.allocated.predicted)} predicted and "
            f"{bytes_or_nothing(comparison.allocated.measured)} measured."
        )
    layout = {"yaxis": {"title": {"text": scale.unit}}, "barmode": "group"}
    return Chart("parts", "What the peak is made of", summary, traces, layout, table)


def phases_chart(comparison: Comparison) -> Chart:
    """The peak within each phase, predicted and measured."""
    rows = [row for row in comparison.phases if row.memory.predicted is not None or row.memory.measured is not None]
    largest = max(max(row.memory.predicted or 0, row.memory.measured or 0) for row in rows)
    scale = scale_for(largest)
    limit = comparison.plan.target.usable_bytes - comparison.plan.target.outside_bytes
    layout = {
        "yaxis": {
            "title": {"text": f"peak within the phase ({scale.unit})"},
            "range": headroom(largest, limit, scale),
        },
        "barmode": "group",
        "shapes": [limit_line(limit, scale)] if within_sight(limit, largest) else [],
    }
    summary = (
        f"Predicted peak in {comparison.prediction.peak_phase}, measured peak in {comparison.measurement.peak_phase}; "
        f"tensors may take {format_bytes(limit)}."
    )
    traces = _pair_bars([row.name for row in rows], [row.memory for row in rows], scale)
    table = _pair_table("phase", [(row.name, row.memory) for row in rows])
    return Chart("phases", "Peak within each phase", summary, traces, layout, table)


def blocks_chart(plan: Plan, rows: Sequence[BlockRow]) -> Chart | None:
    """The peak while each block is active, the worst one marked; None where no block has a figure."""
    known = [row for row in rows if row.memory.predicted is not None or row.memory.measured is not None]
    if not known:
        return None
    heights = [max(row.memory.predicted or 0, row.memory.measured or 0) for row in known]
    worst = heights.index(max(heights))
    scale = scale_for(heights[worst])
    names = [escaped(row.name) for row in known]
    positions = list(range(len(known)))
    traces = _pair_bars(names, [row.memory for row in known], scale, positions)
    lowest = min(size for row in known for size in (row.memory.predicted, row.memory.measured) if size is not None)
    limit = plan.target.usable_bytes - plan.target.outside_bytes
    # Blocks differ by little against what they share, so the axis starts just below the lowest and says so.
    base = max(0, lowest - 2 * (heights[worst] - lowest) - heights[worst] // 50)
    top = max(heights[worst], limit if within_sight(limit, heights[worst]) else 0)
    layout = {
        "yaxis": {
            "title": {"text": f"peak ({scale.unit}), axis from {format_bytes(base)}"},
            "range": [scale(base), scale(top + (top - base) // 8)],
        },
        "xaxis": block_axis([row.name for row in known]),
        "barmode": "group",
        "shapes": [limit_line(limit, scale)] if within_sight(limit, heights[worst]) else [],
        "annotations": [_marker(worst, scale(heights[worst]), f"worst: {names[worst]}", worst / len(known))],
    }
    summary = (
        f"The worst of {len(known)} blocks is {clean(known[worst].name)} with {format_bytes(heights[worst])}; "
        f"the lightest peak is {format_bytes(lowest)}."
    )
    table = _pair_table("block", [(clean(row.name), row.memory) for row in known])
    return Chart("blocks", "Peak while each block is active", summary, traces, layout, table)


def _event_in_words(sample: Sample) -> str:
    """What hovering says; the tensor's description names its module."""
    return (
        f"<b>{format_bytes(sample.total_bytes)}</b> in {sample.phase}<br>"
        f"{signed_bytes(sample.change_bytes)} {escaped(sample.tensor)}"
    )


def _phase_bands(timeline: StepTimeline) -> list[dict[str, Any]]:
    """A named band per phase, every second one tinted."""
    bands = []
    ends = [*(span.begin for span in timeline.spans[1:]), timeline.spans[-1].end]
    for index, (span, end) in enumerate(zip(timeline.spans, ends, strict=True)):
        band = {
            "type": "rect",
            "xref": "x",
            "yref": "paper",
            "x0": span.begin,
            "x1": end,
            "y0": 0,
            "y1": 1,
            "layer": "below",
            "line": {"width": 0},
            "fillcolor": "#888888",
            "opacity": 0.15 if index % 2 else 0,
        }
        wide_enough = (end - span.begin) * 12 >= timeline.spans[-1].end - timeline.spans[0].begin
        if wide_enough:
            band["label"] = {"text": span.phase.value, "textposition": "top center"}
        bands.append(band)
    return bands


def _marker(x: float, y: float, text: str, along: float) -> dict[str, Any]:
    """An arrow from ``text`` to a point; ``along`` the axis, from 0 to 1, decides to which side the text goes."""
    side = "left" if along < 1 / 3 else ("right" if along > 2 / 3 else "center")
    return {"x": x, "y": y, "text": text, "showarrow": True, "arrowhead": 2, "ax": 0, "ay": -28, "xanchor": side}


def _bars(name: str, x: Sequence[Any], sizes: Sequence[int | None], scale: Scale, colour: str) -> dict[str, Any]:
    return {
        "type": "bar",
        "name": name,
        "x": list(x),
        "y": [None if size is None else scale(size) for size in sizes],
        "text": [bytes_or_nothing(size) for size in sizes],
        "textposition": "none",
        "marker": filled(colour, "" if colour == PREDICTED_COLOUR else "/"),
    }


def _pair_bars(
    names: Sequence[str], pairs: Sequence[Pair], scale: Scale, positions: Sequence[int] | None = None
) -> tuple[dict[str, Any], ...]:
    """Predicted and measured side by side; a side without any figure is left out."""
    traces = []
    for side, colour in (("predicted", PREDICTED_COLOUR), ("measured", MEASURED_COLOUR)):
        sizes = [pair.predicted if side == "predicted" else pair.measured for pair in pairs]
        if any(size is not None for size in sizes):
            bars = _bars(side, positions or names, sizes, scale, colour)
            bars["hovertext"] = list(names)
            bars["hovertemplate"] = f"%{{hovertext}}<br>%{{text}} {side}<extra></extra>"
            traces.append(bars)
    return tuple(traces)


def _pair_table(first: str, named: Sequence[tuple[str, Pair]]) -> TableData:
    return TableData(
        (first, "predicted", "measured", "error", "error %"),
        tuple(
            (
                name,
                bytes_or_nothing(pair.predicted),
                bytes_or_nothing(pair.measured),
                signed_bytes(pair.error_bytes),
                error_percent(pair),
            )
            for name, pair in named
        ),
    )

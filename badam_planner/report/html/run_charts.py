"""Charts of one plan and its run: the step, what its peak is made of, phases, blocks, modules, loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from badam.plan import Plan, Prediction
from badam.profiling.modules.record import ModuleTimelines, Span, StepModules
from badam.units import format_bytes, format_seconds
from badam.vocabulary import Category, Phase
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
from badam_planner.report.html.model import Sample, StepTimeline, TrainingCurve
from badam_planner.report.text import NOTHING, bytes_or_nothing, clean, error_percent, signed_bytes

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


def backward_chart(rows: Sequence[BlockRow]) -> Chart | None:
    """Backward time per block; None where nothing was measured."""
    known = [row for row in rows if row.backward_seconds is not None]
    if not known:
        return None
    names = [escaped(row.name) for row in known]
    traces = []
    for name, dash, symbol, colour, seconds in (
        ("predicted share", "dot", "circle-open", PREDICTED_COLOUR, [row.predicted_backward_seconds for row in known]),
        ("measured", "solid", "square", MEASURED_COLOUR, [row.backward_seconds for row in known]),
    ):
        if any(value is not None for value in seconds):
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": name,
                    "x": list(range(len(known))),
                    "y": [None if value is None else float(f"{value * 1e3:.4g}") for value in seconds],
                    "hovertext": names,
                    "hovertemplate": f"%{{hovertext}}<br>%{{y}} ms {name}<extra></extra>",
                    "line": {"dash": dash, "color": colour},
                    "marker": {"symbol": symbol, "size": 9, "color": colour},
                }
            )
    layout = {
        "xaxis": block_axis([row.name for row in known]),
        "yaxis": {"title": {"text": "backward (ms)"}, "rangemode": "tozero"},
    }
    slowest = max(known, key=lambda row: row.backward_seconds or 0)
    summary = (
        f"Slowest is {clean(slowest.name)}, {format_seconds(slowest.backward_seconds or 0)}. The prediction says how "
        "the measured sum, recomputation included, is shared among the blocks."
    )
    table = TableData(
        ("block", "predicted share", "measured"),
        tuple(
            (clean(row.name), _seconds(row.predicted_backward_seconds), _seconds(row.backward_seconds)) for row in known
        ),
    )
    return Chart("backward", "Backward time of each block", summary, tuple(traces), layout, table)


def curve_chart(curve: TrainingCurve, *, most_rows: int = 60) -> Chart:
    """The loss over the steps; visits to blocks are shaded."""
    points = curve.points
    stride = max(1, -(-len(points) // most_rows))
    visits = _visits(curve)
    layout = {
        "xaxis": {"title": {"text": "optimizer step"}},
        "yaxis": {"title": {"text": "training loss"}},
        "shapes": [
            {
                "type": "rect", "xref": "x", "yref": "paper", "x0": first, "x1": last, "y0": 0, "y1": 1,
                "layer": "below", "line": {"width": 0}, "fillcolor": "#888888", "opacity": 0.15 if index % 2 else 0,
            }
            for index, (_, first, last) in enumerate(visits)
        ],
    }  # fmt: skip
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "loss",
        "x": [point.step for point in points],
        "y": [float(f"{point.loss:.5g}") for point in points],
        "text": [escaped(point.block or "") for point in points],
        "hovertemplate": "step %{x}: %{y}<br>%{text}<extra></extra>",
        "line": {"color": PREDICTED_COLOUR},
        "marker": {"size": 5},
    }
    table = TableData(
        ("step", "loss", "active block"),
        tuple((str(point.step), f"{point.loss:.4f}", clean(point.block or NOTHING)) for point in points[::stride]),
    )
    summary = (
        f"{clean(curve.name)}: loss {points[0].loss:.3f} at step {points[0].step}, {points[-1].loss:.3f} at step "
        f"{points[-1].step}, over {len(visits)} visits."
    )
    return Chart("loss", "Training loss, visits shaded", summary, (trace,), layout, table)


def _visits(curve: TrainingCurve) -> list[tuple[str, float, float]]:
    """(block, first, last) of every run of points with one block active, in steps; borders lie between points."""
    visits: list[tuple[str, float, float]] = []
    for point in curve.points:
        block = point.block or ""
        if visits and visits[-1][0] == block:
            visits[-1] = (block, visits[-1][1], point.step + 0.5)
        else:
            visits.append((block, visits[-1][2] if visits else point.step - 0.5, point.step + 0.5))
    return visits


def _seconds(seconds: float | None) -> str:
    return NOTHING if seconds is None else format_seconds(seconds)


COLOURS = {
    Phase.FORWARD: PREDICTED_COLOUR,
    Phase.LOSS: "#56b4e9",
    Phase.BACKWARD: MEASURED_COLOUR,
    Phase.RECOMPUTE: "#f0e442",
    Phase.STEP: "#009e73",
    Phase.SWITCH: "#cc79a7",
    Phase.SETUP: "#999999",
}

MOST_SPANS = 3000
"""More are not drawn: the shortest, which would be less than a pixel wide."""

MOST_ROWS = 60
"""Modules in the table, the slowest."""

PARTS = (Phase.FORWARD, Phase.RECOMPUTE, Phase.BACKWARD)


def modules_chart(timelines: ModuleTimelines) -> Chart | None:
    """The step with the highest peak; None where no step was followed."""
    if not timelines.steps:
        return None
    step = timelines.worst
    spans = list(timelines.spans(step))
    depths = _depths(spans)
    seconds = max(span.end_seconds for span in spans)
    drawn = sorted(range(len(spans)), key=lambda index: -spans[index].seconds)[:MOST_SPANS]
    phases = sorted({spans[index].phase for index in drawn}, key=list(COLOURS).index)
    chosen = {phase: [index for index in sorted(drawn) if spans[index].phase is phase] for phase in phases}
    levels = max(depths) + 1
    scale = scale_for(step.highest_bytes)
    layout = {
        "xaxis": {"title": {"text": "time in the step (ms)"}, "range": [0, seconds * 1e3], "anchor": "y2"},
        "yaxis": {
            "title": {"text": f"allocated ({scale.unit})"},
            "domain": [0.55, 1],
            "range": [0, scale(step.highest_bytes) * 1.15],
        },
        "yaxis2": {"domain": [0, 0.52], "range": [levels - 0.5, -0.5], "showticklabels": False, "showgrid": False},
        "barmode": "overlay",
        "bargap": 0,
        "hovermode": "closest",
        "uniformtext": {"mode": "hide", "minsize": 9},
    }
    place = _module_at(spans, _seconds_of_peak(step))
    left_out = len(spans) - len(drawn)
    summary = (
        f"Step {step.step + 1}, with {clean(step.block)} active, took {format_seconds(seconds)} while it was followed, "
        f"which slows it. Its peak is {format_bytes(step.highest_bytes)}, in {place}."
        f"{f' The {left_out:,} shortest stretches are not drawn.' if left_out else ''}"
    )
    traces = (_memory_trace(step, spans, scale), *(_span_bars(phase, chosen[phase], spans, depths) for phase in phases))
    return Chart("modules", "One measured step, module by module", summary, traces, layout, _span_table(spans), 560)


def _memory_trace(step: StepModules, spans: Sequence[Span], scale: Any) -> dict[str, Any]:
    """The highest allocated bytes between each boundary and the next; what ran there is said on hovering."""
    moments = [microseconds / 1e6 for microseconds in step.microseconds]
    middles = [(before + after) / 2 for before, after in zip([moments[0], *moments], moments, strict=False)]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "allocated",
        "x": [_milliseconds(moment) for moment in moments],
        "y": [scale(size) for size in step.peak_bytes],
        "text": [
            f"<b>{format_bytes(size)}</b> in {escaped(_module_at(spans, middle))}"
            for size, middle in zip(step.peak_bytes, middles, strict=True)
        ],
        "hovertemplate": "%{text}<extra></extra>",
        "line": {"shape": "vh", "width": 1.5},
        "fill": "tozeroy",
        "fillcolor": "rgba(128,128,128,0.25)",
        "meta": "ink",
    }


def _span_bars(phase: Phase, indices: Sequence[int], spans: Sequence[Span], depths: Sequence[int]) -> dict[str, Any]:
    chosen = [spans[index] for index in indices]
    return {
        "type": "bar",
        "orientation": "h",
        "name": phase.value,
        "yaxis": "y2",
        "base": [_milliseconds(span.begin_seconds) for span in chosen],
        "x": [_milliseconds(span.seconds) for span in chosen],
        "y": [depths[index] for index in indices],
        "width": 0.9,
        "text": [escaped(_short(span)) for span in chosen],
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "hovertext": [_in_words(span) for span in chosen],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {"color": COLOURS[phase], "line": {"width": 0.5, "color": "rgba(0,0,0,0.4)"}},
        "meta": "thin",
    }


def _in_words(span: Span) -> str:
    return (
        f"<b>{escaped(span.module or 'the whole phase')}</b><br>{span.phase}, {format_seconds(span.seconds)}<br>"
        f"{format_bytes(span.before_bytes)} before, {format_bytes(span.after_bytes)} after<br>"
        f"highest {format_bytes(span.peak_bytes)}"
    )


def _short(span: Span) -> str:
    """The end of a module's path: its name, or its place in a list with the name of the list."""
    parts = span.module.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1] or span.phase.value


def _depths(spans: Sequence[Span]) -> list[int]:
    """How many spans lie around each; spans come in order of their beginning, outer ones first."""
    depths: list[int] = []
    open_until: list[float] = []
    for span in spans:
        while open_until and open_until[-1] <= span.begin_seconds and open_until[-1] < span.end_seconds:
            open_until.pop()
        depths.append(len(open_until))
        open_until.append(span.end_seconds)
    return depths


def _seconds_of_peak(step: StepModules) -> float:
    """A moment between the two boundaries that the peak lies between."""
    after = step.peak_bytes.index(step.highest_bytes)
    return (step.microseconds[max(0, after - 1)] + step.microseconds[after]) / 2e6


def _module_at(spans: Sequence[Span], seconds: float) -> str:
    """The innermost module that ran then, with its phase."""
    inside = [span for span in spans if span.begin_seconds <= seconds <= span.end_seconds]
    if not inside:
        return "no phase"
    innermost = max(inside, key=lambda span: (span.module.count(".") + bool(span.module), span.begin_seconds))
    return (
        f"{innermost.phase} of {clean(innermost.module)}"
        if innermost.module
        else f"{innermost.phase}, outside the modules"
    )


def _span_table(spans: Sequence[Span]) -> TableData:
    times: dict[str, dict[Phase, float]] = {}
    peaks: dict[str, int] = {}
    for span in spans:
        if span.module:
            own = times.setdefault(span.module, {})
            own[span.phase] = own.get(span.phase, 0.0) + span.seconds
            peaks[span.module] = max(peaks.get(span.module, 0), span.peak_bytes)
    # A recomputation lies inside the backward of its layer.
    slowest = sorted(times, key=lambda name: -sum(times[name].get(phase, 0.0) for phase in PARTS))[:MOST_ROWS]
    return TableData(
        ("module", "forward", "recomputation", "backward with it", "highest memory"),
        tuple(
            (
                clean(name),
                *(format_seconds(times[name][phase]) if phase in times[name] else NOTHING for phase in PARTS),
                format_bytes(peaks[name]),
            )
            for name in slowest
        ),
    )


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 3)

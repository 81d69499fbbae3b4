"""The chart of a measured step, module by module: what ran when, and the memory meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from badam.profiling.modules.record import ModuleTimelines, Span, StepModules
from badam.units import format_bytes, format_seconds
from badam.vocabulary import Phase
from badam_planner.report.html.chart import MEASURED_COLOUR, PREDICTED_COLOUR, Chart, TableData, escaped, scale_for
from badam_planner.report.text import NOTHING, clean

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
    traces = (_memory_trace(step, spans, scale), *(_bars(phase, chosen[phase], spans, depths) for phase in phases))
    return Chart("modules", "One measured step, module by module", summary, traces, layout, _table(spans), 560)


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


def _bars(phase: Phase, indices: Sequence[int], spans: Sequence[Span], depths: Sequence[int]) -> dict[str, Any]:
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


def _table(spans: Sequence[Span]) -> TableData:
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

"""Charts of time: the backward of each block, and the loss over the steps."""

from __future__ import annotations

from collections.abc import Sequence

from badam.units import format_seconds
from badam_planner.accuracy.comparison import BlockRow
from badam_planner.report.html.chart import MEASURED_COLOUR, PREDICTED_COLOUR, Chart, TableData, block_axis, escaped
from badam_planner.report.html.model import TrainingCurve
from badam_planner.report.text import NOTHING, clean


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

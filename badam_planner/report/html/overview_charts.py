"""Charts that set things side by side: the candidates of a search, and predicted against measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from badam.units import format_bytes
from badam_planner.accuracy.comparison import Comparison, Pair
from badam_planner.report.html.chart import (
    MEASURED_COLOUR,
    PREDICTED_COLOUR,
    Chart,
    Scale,
    TableData,
    escaped,
    limit_line,
    scale_for,
    within_sight,
)
from badam_planner.report.text import bytes_or_nothing, clean, error_percent
from badam_planner.search.result import Candidate, SearchResult

STANDINGS = {
    "recommended": ("star", "#009e73"),
    "fits": ("circle", PREDICTED_COLOUR),
    "does not fit": ("x", MEASURED_COLOUR),
}
"""How a candidate is drawn: its symbol says what its colour says."""

KINDS = {
    "totals": ("diamond", "#cc79a7"),
    "phases": ("square", PREDICTED_COLOUR),
    "blocks": ("circle", MEASURED_COLOUR),
}


def partitions_chart(result: SearchResult) -> Chart:
    """Every candidate of the planned method by what it needs on the device and what its backward costs."""
    candidates = [one for one in result.candidates if one.method == result.candidates[0].method]
    largest = max(candidate.peak_device_bytes for candidate in candidates)
    scale = scale_for(largest)
    # The names of neighbours go to different sides.
    ranked = sorted({one.peak_device_bytes for one in candidates})
    sides = {size: ("top center", "bottom center")[rank % 2] for rank, size in enumerate(ranked)}
    traces = []
    for standing in STANDINGS:
        chosen = [candidate for candidate in candidates if standing_of(candidate) == standing]
        if chosen:
            traces.append(_candidates_trace(standing, chosen, scale, sides))
    costliest = max(candidate.backward_relative for candidate in candidates)
    shown_limit = within_sight(result.usable_bytes, largest)
    lowest = min(candidate.peak_device_bytes for candidate in candidates)
    highest = max(largest, result.usable_bytes) if shown_limit else largest
    around = max(highest - lowest, highest // 10)
    layout = {
        "xaxis": {
            "title": {"text": f"peak on the device ({scale.unit})"},
            "range": [scale(max(0, lowest - around // 6)), scale(highest + around // 4)],
        },
        "yaxis": {"title": {"text": "backward (% of all blocks active)"}, "range": [0, costliest * 125 or 1]},
        "shapes": [limit_line(result.usable_bytes, scale, vertical=True)] if shown_limit else [],
    }
    table = TableData(
        ("blocks by", "checkpointing", "loss", "D", "device peak", "headroom", "backward", "verdict"),
        tuple(
            (
                one.strategy,
                one.checkpointing,
                one.loss,
                str(one.num_blocks),
                format_bytes(one.peak_device_bytes),
                format_bytes(one.headroom_bytes),
                f"{one.backward_relative:.0%}",
                standing_of(one),
            )
            for one in candidates
        ),
    )
    fitting = sum(one.fits for one in candidates)
    summary = f"{fitting} of {len(candidates)} candidates fit into {format_bytes(result.usable_bytes)}."
    return Chart("partitions", "Partitions compared", summary, tuple(traces), layout, table)


def accuracy_chart(comparisons: Sequence[Comparison]) -> Chart:
    """Every compared peak, predicted against measured, with the tolerance as a band around equality."""
    groups = _compared_peaks(comparisons)
    every = [named for group in groups.values() for named in group]
    largest = max(max(pair.predicted or 0, pair.measured or 0) for _, pair in every)
    scale, tolerance = scale_for(largest), comparisons[0].verdict.tolerance
    traces = _band(scale(largest) * 1.05, tolerance)
    traces.extend(_peaks_trace(kind, peaks, scale) for kind, peaks in groups.items() if peaks)
    outside = sum(abs(pair.error_fraction or 0) > tolerance for _, pair in every)
    layout = {
        "xaxis": {"title": {"text": f"measured ({scale.unit})"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": f"predicted ({scale.unit})"}, "rangemode": "tozero"},
    }
    table = TableData(
        ("peak", "predicted", "measured", "error %"),
        tuple(
            (clean(name), bytes_or_nothing(pair.predicted), bytes_or_nothing(pair.measured), error_percent(pair))
            for name, pair in every
        ),
    )
    summary = f"{len(every) - outside} of {len(every)} compared peaks are within {tolerance * 100:g}% of the measured."
    return Chart("accuracy", "Predicted against measured", summary, tuple(traces), layout, table)


def standing_of(candidate: Candidate) -> str:
    """Whether a candidate fits and is the one to take, in the words of :data:`STANDINGS`."""
    if candidate.recommended:
        return "recommended"
    return "fits" if candidate.fits else "does not fit"


def _candidates_trace(
    standing: str, chosen: Sequence[Candidate], scale: Scale, sides: Mapping[int, str]
) -> dict[str, Any]:
    symbol, colour = STANDINGS[standing]
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": standing,
        "x": [scale(one.peak_device_bytes) for one in chosen],
        "y": [round(one.backward_relative * 100, 1) for one in chosen],
        "text": [escaped(one.strategy) for one in chosen],
        "textposition": [sides[one.peak_device_bytes] for one in chosen],
        "customdata": [
            f"{escaped(one.strategy)}, checkpointing {one.checkpointing}, {one.loss} loss<br>"
            f"{format_bytes(one.peak_device_bytes)}, backward {one.backward_relative:.0%}"
            for one in chosen
        ],
        "hovertemplate": "%{customdata}<extra></extra>",
        "marker": {"symbol": symbol, "size": 14, "color": colour},
    }


def _compared_peaks(comparisons: Sequence[Comparison]) -> dict[str, list[tuple[str, Pair]]]:
    """(name, pair) of every peak that has both sides, by kind."""
    groups: dict[str, list[tuple[str, Pair]]] = {kind: [] for kind in KINDS}
    for number, one in enumerate(comparisons, start=1):
        run = f"run {number}: " if len(comparisons) > 1 else ""
        groups["totals"] += [(run + row.name, row.memory) for row in one.totals]
        groups["phases"] += [(f"{run}phase {row.name}", row.memory) for row in one.phases]
        groups["blocks"] += [(f"{run}block {row.name}", row.memory) for row in one.blocks]
    return {kind: [peak for peak in peaks if peak[1].error_bytes is not None] for kind, peaks in groups.items()}


def _peaks_trace(kind: str, peaks: Sequence[tuple[str, Pair]], scale: Scale) -> dict[str, Any]:
    symbol, colour = KINDS[kind]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": kind,
        "x": [scale(pair.measured or 0) for _, pair in peaks],
        "y": [scale(pair.predicted or 0) for _, pair in peaks],
        "text": [f"{escaped(name)}: {error_percent(pair)}" for name, pair in peaks],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"symbol": symbol, "size": 10, "color": colour, "opacity": 0.85},
    }


def _band(top: float, tolerance: float) -> list[dict[str, Any]]:
    """The area of predictions within the tolerance, and the line of equality."""
    return [
        {
            "type": "scatter",
            "name": f"within {tolerance * 100:g}%",
            "x": [0, top, top, 0],
            "y": [0, top * (1 + tolerance), top * (1 - tolerance), 0],
            "fill": "toself",
            "fillcolor": "rgba(136,136,136,0.3)",
            "line": {"width": 0},
            "mode": "lines",
            "hoverinfo": "skip",
        },
        {
            "type": "scatter",
            "name": "equal",
            "x": [0, top],
            "y": [0, top],
            "mode": "lines",
            "meta": "ink",
            "line": {"dash": "dot", "width": 1},
            "hoverinfo": "skip",
        },
    ]

"""Charts that set several things side by side: candidates, methods, sizes, and predicted against measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from badam.units import format_bytes
from badam.vocabulary import Category
from badam_planner.accuracy.comparison import Comparison, Pair
from badam_planner.report.formulas import formula_of
from badam_planner.report.html.chart import (
    MEASURED_COLOUR,
    PREDICTED_COLOUR,
    Chart,
    Scale,
    TableData,
    category_style,
    escaped,
    filled,
    limit_line,
    scale_for,
    within_sight,
)
from badam_planner.report.text import bytes_or_nothing, clean, error_percent
from badam_planner.search.result import Candidate, SearchResult, SizeCell, SizeMap

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
    candidates = [candidate for candidate in result.candidates if candidate.method == result.candidates[0].method]
    largest = max(candidate.peak_device_bytes for candidate in candidates)
    scale = scale_for(largest)
    # The names of neighbours go to different sides.
    ranked = sorted({candidate.peak_device_bytes for candidate in candidates})
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
                candidate.strategy,
                candidate.checkpointing,
                candidate.loss,
                str(candidate.num_blocks),
                format_bytes(candidate.peak_device_bytes),
                format_bytes(candidate.headroom_bytes),
                f"{candidate.backward_relative:.0%}",
                standing_of(candidate),
            )
            for candidate in candidates
        ),
    )
    fitting = sum(candidate.fits for candidate in candidates)
    summary = f"{fitting} of {len(candidates)} candidates fit into {format_bytes(result.usable_bytes)}."
    return Chart("partitions", "Partitions compared", summary, tuple(traces), layout, table)


def accuracy_chart(comparisons: Sequence[Comparison]) -> Chart:
    """Every compared peak, predicted against measured, with the tolerance as a band around equality."""
    groups = _compared_peaks(comparisons)
    pairs = [named for group in groups.values() for named in group]
    largest = max(max(pair.predicted or 0, pair.measured or 0) for _, pair in pairs)
    scale, tolerance = scale_for(largest), comparisons[0].verdict.tolerance
    traces = _band(scale(largest) * 1.05, tolerance)
    traces.extend(_peaks_trace(kind, peaks, scale) for kind, peaks in groups.items() if peaks)
    outside = sum(abs(pair.error_fraction or 0) > tolerance for _, pair in pairs)
    layout = {
        "xaxis": {"title": {"text": f"measured ({scale.unit})"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": f"predicted ({scale.unit})"}, "rangemode": "tozero"},
    }
    table = TableData(
        ("peak", "predicted", "measured", "error %"),
        tuple(
            (clean(name), bytes_or_nothing(pair.predicted), bytes_or_nothing(pair.measured), error_percent(pair))
            for name, pair in pairs
        ),
    )
    summary = f"{len(pairs) - outside} of {len(pairs)} compared peaks are within {tolerance * 100:g}% of the measured."
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
        "x": [scale(candidate.peak_device_bytes) for candidate in chosen],
        "y": [round(candidate.backward_relative * 100, 1) for candidate in chosen],
        "text": [escaped(candidate.strategy) for candidate in chosen],
        "textposition": [sides[candidate.peak_device_bytes] for candidate in chosen],
        "customdata": [
            f"{escaped(candidate.strategy)}, checkpointing {candidate.checkpointing}, {candidate.loss} loss<br>"
            f"{format_bytes(candidate.peak_device_bytes)}, backward {candidate.backward_relative:.0%}"
            for candidate in chosen
        ],
        "hovertemplate": "%{customdata}<extra></extra>",
        "marker": {"symbol": symbol, "size": 14, "color": colour},
    }


def _compared_peaks(comparisons: Sequence[Comparison]) -> dict[str, list[tuple[str, Pair]]]:
    """(name, pair) of every peak that has both sides, by kind."""
    groups: dict[str, list[tuple[str, Pair]]] = {kind: [] for kind in KINDS}
    for number, comparison in enumerate(comparisons, start=1):
        run = f"run {number}: " if len(comparisons) > 1 else ""
        groups["totals"] += [(run + row.name, row.memory) for row in comparison.totals]
        groups["phases"] += [(f"{run}phase {row.name}", row.memory) for row in comparison.phases]
        groups["blocks"] += [(f"{run}block {row.name}", row.memory) for row in comparison.blocks]
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


LEVELS = (
    ("fits", "#b7dfd2"),
    ("fits with checkpointing", "#8fc1e3"),
    ("does not fit", "#f2b79f"),
)
"""How a size is drawn. Light in both themes, with dark words on them that say the same."""

DARK_INK = "#1b1f24"


def methods_chart(result: SearchResult) -> Chart | None:
    """The device peak of each compared method, stacked by what it is made of; None where only one was planned.

    Of a method with several partitions the recommended one stands for it, or the first that fits.
    """
    chosen = [
        _of_method(result, method) for method in dict.fromkeys(candidate.method for candidate in result.candidates)
    ]
    if len(chosen) + len(result.left_out) < 2:
        return None
    chosen.sort(key=lambda candidate: candidate.peak_device_bytes)
    largest = chosen[-1].peak_device_bytes
    scale = scale_for(largest)
    parts = [device_parts(candidate) for candidate in chosen]
    names = [
        f"{'' if candidate.fits else '✗ '}{escaped(candidate.method)} {candidate.peak_device_bytes / scale.factor:.1f}"
        for candidate in chosen
    ]
    traces = [
        _part_bars(category, names, [part.get(category, 0) for part in parts], scale)
        for category in Category
        if any(part.get(category) for part in parts)
    ]
    fitting = [candidate for candidate in chosen if candidate.fits]
    least = f"; {clean(fitting[0].method)} needs least" if fitting else ""
    left_out = "".join(f" Left out: {clean(method)}. {clean(reason)}" for method, reason in result.left_out)
    limit = limit_line(result.usable_bytes, scale, vertical=True)
    del limit["label"]  # it would lie on the bars
    shown_limit = within_sight(result.usable_bytes, largest)
    # A method that needs several cards would squeeze the others: its bar is cut at the edge, its name says the size.
    edge = min(largest, max(2 * result.usable_bytes, 3 * chosen[0].peak_device_bytes // 2))
    edge = max(edge, result.usable_bytes if shown_limit else 0)
    layout = {
        "barmode": "stack",
        "xaxis": {
            "title": {
                "text": f"peak on the device ({scale.unit})<br>dashed: limit {format_bytes(result.usable_bytes)}"
            },
            "range": [0, scale(edge) * 1.02],
        },
        "yaxis": {"autorange": "reversed", "ticklabelposition": "outside", "type": "category"},
        "shapes": [limit] if shown_limit else [],
    }
    table = TableData(
        (
            "method",
            "blocks by",
            "checkpointing",
            "loss",
            "model states",
            "device peak",
            "headroom",
            "backward",
            "verdict",
        ),
        tuple(
            (
                clean(candidate.method),
                candidate.strategy,
                candidate.checkpointing,
                candidate.loss,
                f"{format_bytes(candidate.formula_bytes)} = {formula_of(candidate.method)}",
                format_bytes(candidate.peak_device_bytes),
                format_bytes(candidate.headroom_bytes),
                f"{candidate.backward_relative:.0%}",
                standing_of(candidate),
            )
            for candidate in chosen
        )
        + tuple((clean(method), *("-",) * 7, f"left out: {clean(reason)}") for method, reason in result.left_out),
    )
    summary = (
        f"{len(fitting)} of {len(chosen)} methods fit into {format_bytes(result.usable_bytes)} at batch "
        f"{result.batch}, each with its fastest setting that fits{least}.{left_out}"
    )
    return Chart(
        "methods", "Methods compared on this card", summary, tuple(traces), layout, table, 140 + 34 * len(chosen)
    )


def sizes_chart(sizes: SizeMap) -> Chart:
    """Which batch sizes and lengths fit, the plan's own marked."""
    batches = sorted({cell.batch_size for cell in sizes.cells})
    lengths = sorted({cell.seq_len for cell in sizes.cells})
    by_size = {(cell.batch_size, cell.seq_len): cell for cell in sizes.cells}
    scale = scale_for(sizes.usable_bytes)
    grid = [[by_size[batch, length] for length in lengths] for batch in batches]
    steps = [((index + end) / len(LEVELS), colour) for index, (_, colour) in enumerate(LEVELS) for end in (0, 1)]
    heatmap: dict[str, Any] = {
        "type": "heatmap",
        "x": list(map(str, lengths)),
        "y": list(map(str, batches)),
        "z": [[_level(cell) for cell in row] for row in grid],
        "zmin": -0.5,
        "zmax": len(LEVELS) - 0.5,
        "colorscale": steps,
        "showscale": False,
        "xgap": 3,
        "ygap": 3,
        "text": [[_words(cell, scale) for cell in row] for row in grid],
        "texttemplate": "%{text}",
        "textfont": {"color": DARK_INK, "size": 12},
        "hovertext": [[_sentence(cell) for cell in row] for row in grid],
        "hovertemplate": "%{hovertext}<extra></extra>",
    }
    # A heatmap has no legend; these draw nothing and name the colours.
    legend = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": [None],
            "y": [None],
            "marker": {"symbol": "square", "size": 14, "color": colour},
            "hoverinfo": "skip",
        }
        for name, colour in LEVELS
    ]
    here = lengths.index(sizes.seq_len), batches.index(sizes.batch_size)
    layout = {
        "xaxis": {"title": {"text": "tokens per sequence"}, "type": "category", "showgrid": False},
        "yaxis": {"title": {"text": "sequences per batch"}, "type": "category", "showgrid": False},
        "showlegend": True,
        "shapes": [
            {
                "type": "rect",
                "x0": here[0] - 0.46, "x1": here[0] + 0.46, "y0": here[1] - 0.42, "y1": here[1] + 0.42,
                "line": {"width": 3, "color": DARK_INK},
            }
        ],
    }  # fmt: skip
    fitting = [cell for cell in sizes.cells if cell.fits]
    most = max(fitting, key=lambda cell: cell.batch_size * cell.seq_len, default=None)
    largest = f" Most tokens at once: {most.batch_size} x {most.seq_len}." if most else ""
    summary = (
        f"{len(fitting)} of {len(sizes.cells)} sizes fit into {format_bytes(sizes.usable_bytes)}, each with the "
        f"fastest setting of checkpointing and loss that does.{largest} The plan's own, {sizes.batch_size} x "
        f"{sizes.seq_len}, is framed."
    )
    table = TableData(
        ("batch", "tokens", "checkpointing", "loss", "device peak"),
        tuple(
            (
                str(cell.batch_size),
                str(cell.seq_len),
                cell.checkpointing or "-",
                cell.loss or "-",
                "does not fit" if cell.peak_device_bytes is None else format_bytes(cell.peak_device_bytes),
            )
            for cell in sizes.cells
        ),
    )
    return Chart(
        "sizes", "What fits: batch by length", summary, (heatmap, *legend), layout, table, 140 + 46 * len(batches)
    )


def device_parts(candidate: Candidate) -> dict[Category, int]:
    """What the device peak is made of: the parts of the allocated peak, what else is reserved, and the context.

    Sums to ``peak_device_bytes``.
    """
    parts = dict(candidate.by_category)
    unused = candidate.peak_reserved_bytes - sum(candidate.by_category.values())
    context = candidate.peak_device_bytes - candidate.peak_reserved_bytes
    for category, size in ((Category.CACHE, unused), (Category.CONTEXT, context)):
        if size:
            parts[category] = parts.get(category, 0) + size
    return parts


def _of_method(result: SearchResult, method: str) -> Candidate:
    own = [candidate for candidate in result.candidates if candidate.method == method]
    return next(
        (candidate for candidate in own if candidate.recommended),
        next((candidate for candidate in own if candidate.fits), own[0]),
    )


def _part_bars(category: Category, names: list[str], sizes: list[int], scale: Scale) -> dict[str, Any]:
    colour, pattern = category_style(category)
    return {
        "type": "bar",
        "orientation": "h",
        "name": category.value,
        "y": names,
        "x": [scale(size) for size in sizes],
        "text": [format_bytes(size) for size in sizes],
        "textposition": "none",
        "hovertemplate": f"%{{y}}<br>%{{text}} {category.value}<extra></extra>",
        "marker": filled(colour, pattern),
    }


def _level(cell: SizeCell) -> int:
    if not cell.fits:
        return 2
    return 0 if cell.checkpointing == "none" else 1


def _words(cell: SizeCell, scale: Scale) -> str:
    return "✗" if cell.peak_device_bytes is None else f"{scale(cell.peak_device_bytes):.1f}"


def _sentence(cell: SizeCell) -> str:
    size = f"{cell.batch_size} x {cell.seq_len} tokens"
    if cell.peak_device_bytes is None:
        return f"{size}<br>does not fit with any setting"
    return (
        f"{size}<br>{format_bytes(cell.peak_device_bytes)} on the device<br>"
        f"checkpointing {cell.checkpointing}, {cell.loss} loss"
    )

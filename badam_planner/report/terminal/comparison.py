"""A comparison for the terminal: verdict, bars, tables. Readable at 80 columns and without colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from badam.units import format_batch, format_count, format_seconds
from badam.vocabulary import Category, Phase
from badam_planner.accuracy.compare import explain, fold_categories
from badam_planner.accuracy.comparison import Accuracy, BlockRow, Comparison, Pair, Verdict
from badam_planner.multi_gpu.engines import engine_of
from badam_planner.report.terminal.bars import UNSPLIT, Bar, StackedBars
from badam_planner.report.text import (
    NOTHING,
    bytes_or_nothing,
    clean,
    error_in_words,
    error_percent,
    percent,
    shorten,
    signed_bytes,
)

MOST_BLOCKS = 40
"""A table of more blocks than this shows only the blocks that are most off."""


def render_comparison(comparison: Comparison) -> RenderableType:
    """Everything about one plan and one run, for ``console.print``."""
    parts: list[RenderableType] = [
        *_heading(comparison),
        render_verdict(comparison.verdict),
        Text(),
        _bars(comparison),
        Text(),
        _memory_table("peak", [(row.name, row.memory) for row in comparison.totals]),
        Text(),
        _memory_table("part of the peak", memory_rows(comparison)),
        Text(),
        _phase_table(comparison),
        Text(),
        _block_table(comparison.blocks),
    ]
    parts.extend(Text(f"note: {clean(note)}") for note in comparison.notes)
    return Group(*parts)


def render_verdict(verdict: Verdict) -> Text:
    """One line that says yes or no in words, so that it survives without colour."""
    word, style = ("WITHIN", "bold #009e73") if verdict.passed else ("OVER", "bold #d55e00")
    line = Text.assemble((f"{word} tolerance ({verdict.tolerance * 100:g}%)", style))
    line.append(f": largest error {error_in_words(verdict.worst)} ({clean(verdict.worst_name)})")
    return line


def render_accuracy(accuracy: Accuracy) -> RenderableType:
    """Several runs together: one row each, then the median, the worst and why."""
    table = _table("run", "predicted", "measured", "error", "reserved", "device", "verdict")
    for number, comparison in enumerate(accuracy.comparisons, start=1):
        _, reserved, device = (row.memory for row in comparison.totals)
        table.add_row(
            Text(f"{number} {_run_name(comparison)}"),
            bytes_or_nothing(comparison.allocated.predicted),
            bytes_or_nothing(comparison.allocated.measured),
            error_percent(comparison.allocated),
            error_percent(reserved),
            error_percent(device),
            "within" if comparison.verdict.passed else "OVER",
        )
    worst = accuracy.worst
    number = accuracy.comparisons.index(worst) + 1
    decided = len(accuracy.comparisons) - accuracy.undecided
    fits = f"wrong fits {accuracy.wrong_fits}, false refusals {accuracy.false_refusals} of {decided} decided runs"
    if accuracy.undecided:
        fits += f"; {accuracy.undecided} without device memory measured"
    return Group(
        table,
        Text(f"median error {percent(accuracy.median_error)} of the allocated peak; {fits}."),
        Text(
            f"worst: run {number} ({_run_name(worst)}), {error_in_words(worst.verdict.worst)} "
            f"at {clean(worst.verdict.worst_name)}; {explain(worst)}."
        ),
    )


def _run_name(comparison: Comparison) -> str:
    plan, training = comparison.plan, comparison.run.training
    model = clean(plan.model.id).rsplit("/", 1)[-1]
    how = plan.partition.strategy if plan.method == "badam" else plan.method
    return f"{model} {how} {training.batch_size}x{training.seq_len} {training.checkpointing}"


def _heading(comparison: Comparison) -> list[Text]:
    plan, run = comparison.plan, comparison.run
    training = run.training
    return [
        Text(
            f"{clean(plan.model.id)} ({format_count(plan.model.parameters)} parameters), {run.method}, "
            f"{len(plan.partition.blocks)} blocks by {plan.partition.strategy}",
            style="bold",
        ),
        Text(
            f"batch {format_batch(plan.model.task, training.batch_size, training.seq_len, training.decoder_len)}, "
            f"checkpointing {training.checkpointing}, {run.measurement.steps} steps, "
            f"loss {run.measurement.first_loss:.3f} -> {run.measurement.last_loss:.3f}"
        ),
        Text(f"planned for {clean(plan.target.gpu)}; run on {clean(run.machine.device_name)}"),
        Text(f"memory measured by {clean(run.measurement.memory_source)}"),
    ]


def _bars(comparison: Comparison) -> StackedBars:
    target = comparison.plan.target
    return StackedBars(phase_bars(comparison), target.usable_bytes - target.outside_bytes)


def phase_bars(comparison: Comparison) -> list[Bar]:
    """A bar for each phase and side that has a figure; the peak's own phase is split into its parts."""
    prediction, measurement = comparison.prediction, comparison.measurement
    resident = not engine_of(comparison.plan.target).joins_gpus
    bars = []
    for row in comparison.phases:
        if row.memory.predicted is not None:
            split = prediction.by_category if row.phase is prediction.peak_phase else None
            parts = _parts(row.memory.predicted, prediction.by_category, split, resident=resident)
            bars.append(Bar(row.name, "plan", parts, "peak" if split else ""))
        if row.memory.measured is not None:
            split = measurement.by_category if row.phase is measurement.peak_phase else None
            parts = _parts(row.memory.measured, measurement.by_category, split, resident=resident)
            label = "" if row.memory.predicted is not None else row.name
            bars.append(Bar(label, "run", parts, "peak" if split else ""))
    return bars


def _parts(
    total: int, at_peak: Mapping[Category, int], split: Mapping[Category, int] | None, *, resident: bool
) -> tuple[tuple[str, int], ...]:
    """The parts of one phase's memory, summing to ``total``.

    The records split the peak only. In other phases one part is known all the same: on a single device the model's
    own parameters are always there.
    """
    known = fold_categories(split) if split else {}
    if not split and resident:
        known = {Category.PARAMETER: min(total, at_peak.get(Category.PARAMETER, 0))}
    rest = total - sum(known.values())
    if rest < 0:  # a record that contradicts itself gets a bar of the right length, without a split
        return ((UNSPLIT, total),)
    return (*((category.value, known[category]) for category in Category if category in known), (UNSPLIT, rest))


def _table(first: str, *others: str) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _memory_table(title: str, rows: Sequence[tuple[str, Pair]]) -> Table:
    table = _table(title, "predicted", "measured", "error", "error %")
    for name, pair in rows:
        table.add_row(Text(name), *_memory_cells(pair), style="bold" if name == "sum" else "")
    return table


def _memory_cells(pair: Pair) -> tuple[str, str, str, str]:
    return (
        bytes_or_nothing(pair.predicted),
        bytes_or_nothing(pair.measured),
        signed_bytes(pair.error_bytes),
        error_percent(pair),
    )


def memory_rows(comparison: Comparison) -> list[tuple[str, Pair]]:
    """The parts of the peak, and their sum."""
    return [*((row.name, row.memory) for row in comparison.categories), ("sum", comparison.allocated)]


def _phase_table(comparison: Comparison) -> RenderableType:
    timed = any(row.predicted_seconds is not None for row in comparison.phases)
    table = _table("peak within", "predicted", "measured", "error", "error %", "time", *(["(plan)"] if timed else []))
    for row in comparison.phases:
        planned = [_seconds(row.predicted_seconds)] if timed else []
        table.add_row(row.name, *_memory_cells(row.memory), _seconds(row.seconds), *planned)
    predicted = comparison.prediction.step_seconds
    said = "" if predicted is None else f" (predicted {format_seconds(predicted)})"
    return Group(table, Text(f"whole step: {format_seconds(comparison.measurement.step_seconds)}{said}, median."))


def _block_table(blocks: Sequence[BlockRow]) -> RenderableType:
    shown = list(blocks)
    if len(blocks) > MOST_BLOCKS:
        most_off = sorted(blocks, key=lambda row: -abs(row.memory.error_fraction or 0))[: MOST_BLOCKS // 2]
        shown = [row for row in blocks if row in most_off]
    worst = max((row.memory.measured or 0 for row in blocks), default=0)
    table = _table("peak of block", "predicted", "measured", "error %", "in", "backward", "(plan)")
    for row in shown:
        mark = " *" if row.memory.measured and row.memory.measured == worst else ""
        table.add_row(
            Text(shorten(clean(row.name), 24) + mark),
            bytes_or_nothing(row.memory.predicted),
            bytes_or_nothing(row.memory.measured) if row.steps else "not visited",
            error_percent(row.memory),
            _phases(row.predicted_phase, row.measured_phase),
            _seconds(row.backward_seconds),
            _seconds(row.predicted_backward_seconds),
        )
    lines: list[RenderableType] = [table]
    if len(shown) < len(blocks):
        lines.append(Text(f"{len(blocks) - len(shown)} more blocks are closer than these; --json lists all of them."))
    lines.append(Text("* highest. Backward includes recomputation; (plan): predicted share of its sum."))
    return Group(*lines)


def _phases(predicted: Phase | None, measured: Phase | None) -> str:
    if predicted is None or measured is None or predicted is measured:
        return str(measured or predicted or NOTHING)
    return f"{measured} (plan: {predicted})"


def _seconds(seconds: float | None) -> str:
    return NOTHING if seconds is None else format_seconds(seconds)

"""The HTML reports: a plan alone, a plan beside its run, several runs together."""

from __future__ import annotations

from pathlib import Path

from badam.errors import InputError
from badam.plan import Plan, Provenance
from badam.profiling.modules.record import ModuleTimelines
from badam.units import format_batch, format_bytes, format_count, format_seconds
from badam_planner.accuracy.compare import block_rows, explain
from badam_planner.accuracy.comparison import Accuracy, Comparison
from badam_planner.report.formulas import formula_of
from badam_planner.report.html.chart import Chart, TableData
from badam_planner.report.html.choice_charts import accuracy_chart, methods_chart, partitions_chart, sizes_chart
from badam_planner.report.html.model import StepTimeline, TrainingCurve
from badam_planner.report.html.page import Page, write_page
from badam_planner.report.html.run_charts import (
    backward_chart,
    blocks_chart,
    curve_chart,
    modules_chart,
    parts_chart,
    phases_chart,
    timeline_chart,
)
from badam_planner.report.text import bytes_or_nothing, error_in_words, error_percent, percent, signed_bytes
from badam_planner.search.result import SearchResult, SizeMap


def write_plan_html(
    plan: Plan,
    path: str | Path,
    *,
    result: SearchResult | None = None,
    timeline: StepTimeline | None = None,
    sizes: SizeMap | None = None,
) -> None:
    """Write the report of a plan.

    Args:
        plan: with its prediction.
        path: of the HTML file; an existing one is replaced whole.
        result: all candidates of the search; adds their charts.
        timeline: one step of the worst block; adds its chart.
        sizes: what fits at other batch sizes and lengths; adds its chart.

    Raises:
        InputError: if the plan has no prediction or the file cannot be written.
    """
    write_page(plan_page(plan, result=result, timeline=timeline, sizes=sizes), Path(path))


def write_comparison_html(
    comparison: Comparison,
    path: str | Path,
    *,
    timeline: StepTimeline | None = None,
    curve: TrainingCurve | None = None,
    modules: ModuleTimelines | None = None,
) -> None:
    """Write the report of one plan and one run of it; raises InputError like :func:`write_plan_html`."""
    write_page(comparison_page(comparison, timeline=timeline, curve=curve, modules=modules), Path(path))


def write_accuracy_html(accuracy: Accuracy, path: str | Path) -> None:
    """Write the report of several runs together; raises InputError like :func:`write_plan_html`."""
    write_page(accuracy_page(accuracy), Path(path))


def plan_page(
    plan: Plan,
    *,
    result: SearchResult | None = None,
    timeline: StepTimeline | None = None,
    sizes: SizeMap | None = None,
) -> Page:
    """What the report of a plan says."""
    prediction = plan.prediction
    if prediction is None:
        raise InputError("The plan holds no prediction to show.", advice="Write one that does with badam-plan.")
    headroom = plan.target.usable_bytes - prediction.peak_device_bytes
    fits = headroom >= 0
    verdict = (
        f"It needs {format_bytes(prediction.peak_device_bytes)} of {format_bytes(plan.target.usable_bytes)} on "
        f"{plan.target.gpu}: {format_bytes(abs(headroom))} {'to spare' if fits else 'too much'}."
    )
    charts: list[Chart | None] = [
        timeline_chart(timeline) if timeline else None,
        parts_chart(prediction, None),
        blocks_chart(plan, block_rows(plan.partition.blocks)),
        partitions_chart(result) if result else None,
        methods_chart(result) if result else None,
        sizes_chart(sizes) if sizes else None,
    ]
    peaks = TableData(
        ("peak", "predicted"),
        (
            (f"model states alone, {formula_of(plan.method)}", format_bytes(prediction.formula_bytes)),
            ("allocated", format_bytes(prediction.peak_allocated_bytes)),
            ("reserved", format_bytes(prediction.peak_reserved_bytes)),
            ("on the device", format_bytes(prediction.peak_device_bytes)),
        ),
    )
    place = f" in module {prediction.peak_module}" if prediction.peak_module else ""
    return Page(
        title=f"Plan: {plan.model.id} on {plan.target.gpu}",
        lead=f"The peak is in {prediction.peak_phase}{place}, while {prediction.peak_block} is active.",
        passed=fits,
        verdict=verdict,
        facts=_plan_facts(plan),
        notes=(),
        tables=(("Predicted peaks", peaks),),
        charts=tuple(chart for chart in charts if chart is not None),
        footer=_provenance(plan.provenance),
    )


def comparison_page(
    comparison: Comparison,
    *,
    timeline: StepTimeline | None = None,
    curve: TrainingCurve | None = None,
    modules: ModuleTimelines | None = None,
) -> Page:
    """What the report of a plan and its run says."""
    plan, run, measurement = comparison.plan, comparison.run, comparison.measurement
    rows = comparison.blocks
    charts: list[Chart | None] = [
        phases_chart(comparison),
        parts_chart(comparison.prediction, comparison),
        blocks_chart(plan, rows),
        backward_chart(rows),
        accuracy_chart([comparison]),
        timeline_chart(timeline) if timeline else None,
        modules_chart(modules) if modules else None,
        curve_chart(curve) if curve else None,
    ]
    facts = (
        *_plan_facts(plan),
        ("run on", run.machine.device_name),
        ("memory measured by", measurement.memory_source),
        ("steps", str(measurement.steps)),
        ("step time", format_seconds(measurement.step_seconds)),
        ("tokens per second", f"{measurement.tokens_per_second:.0f}"),
        ("loss", f"{measurement.first_loss:.4f} at the start, {measurement.last_loss:.4f} at the end"),
    )
    return Page(
        title=f"Predicted against measured: {plan.model.id}",
        lead=f"Planned for {plan.target.gpu}, run on {run.machine.device_name}.",
        passed=comparison.verdict.passed,
        verdict=_verdict(comparison),
        facts=facts,
        notes=comparison.notes,
        tables=(("Peaks of the whole run", _totals_table(comparison)),),
        charts=tuple(chart for chart in charts if chart is not None),
        footer=f"Plan: {_provenance(plan.provenance)} Run: {_provenance(run.provenance)}",
    )


def accuracy_page(accuracy: Accuracy) -> Page:
    """What the report of several runs says."""
    worst = accuracy.worst
    number = accuracy.comparisons.index(worst) + 1
    rows = tuple(
        (
            f"{index}. {_model_and_blocks(comparison.plan)}",
            f"{comparison.run.training.batch_size} x {comparison.run.training.seq_len}",
            comparison.run.training.checkpointing,
            *(error_percent(row.memory) for row in comparison.totals),
            "within" if comparison.verdict.passed else "over",
        )
        for index, comparison in enumerate(accuracy.comparisons, start=1)
    )
    passed = sum(comparison.verdict.passed for comparison in accuracy.comparisons)
    columns = ("run", "batch x tokens", "checkpointing", "allocated", "reserved", "device", "tolerance")
    return Page(
        title=f"Accuracy of {len(accuracy.comparisons)} runs",
        lead=f"Worst is run {number}: {error_in_words(worst.verdict.worst)} at {worst.verdict.worst_name}; "
        f"{explain(worst)}.",
        passed=passed == len(accuracy.comparisons),
        verdict=f"{passed} of {len(accuracy.comparisons)} runs are within {worst.verdict.tolerance * 100:g}%.",
        facts=(
            ("median error of the allocated peak", percent(accuracy.median_error)),
            ("wrong fits", str(accuracy.wrong_fits)),
            ("false refusals", str(accuracy.false_refusals)),
            ("without device memory measured", str(accuracy.undecided)),
        ),
        notes=(),
        tables=(("Error of each run", TableData(columns, rows)),),
        charts=(accuracy_chart(accuracy.comparisons),),
        footer=_provenance(worst.run.provenance),
    )


def _verdict(comparison: Comparison) -> str:
    verdict = comparison.verdict
    relation = "within" if verdict.passed else "over"
    return (
        f"The largest error is {relation} the tolerance of {verdict.tolerance * 100:g}%: "
        f"{error_in_words(verdict.worst)}, at {verdict.worst_name}; {explain(comparison)}."
    )


def _model_and_blocks(plan: Plan) -> str:
    return f"{plan.model.id}, {plan.method}, {plan.partition.strategy} blocks"


def _totals_table(comparison: Comparison) -> TableData:
    return TableData(
        ("peak", "predicted", "measured", "error", "error %"),
        tuple(
            (
                row.name,
                bytes_or_nothing(row.memory.predicted),
                bytes_or_nothing(row.memory.measured),
                signed_bytes(row.memory.error_bytes),
                error_percent(row.memory),
            )
            for row in comparison.totals
        ),
    )


def _plan_facts(plan: Plan) -> tuple[tuple[str, str], ...]:
    training = plan.training
    batch = format_batch(plan.model.task, training.batch_size, training.seq_len, training.decoder_len)
    return (
        ("model", f"{plan.model.id}, {format_count(plan.model.parameters)} parameters"),
        (
            "card",
            f"{plan.target.gpu}, {format_bytes(plan.target.usable_bytes)} usable"
            + (", expandable segments" if plan.target.expandable_segments else ""),
        ),
        ("method", f"{plan.method}, {len(plan.partition.blocks)} blocks by {plan.partition.strategy}"),
        ("task", plan.model.task),
        ("batch", f"{batch}, {training.grad_accum} per optimizer step"),
        ("checkpointing", training.checkpointing),
        ("loss and attention", f"{training.loss}, {training.attention}, {training.dtype}"),
    )


def _provenance(provenance: Provenance) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in provenance.versions.items())
    return f"{provenance.command} ({provenance.date}; {versions})."

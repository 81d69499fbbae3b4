"""Predicted against measured: pure functions from a plan and a measured run to a :class:`~.comparison.Comparison`.

Nothing here prints; :mod:`badam_planner.report` renders the result as text, JSON or HTML.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from badam.errors import InputError
from badam.plan import BlockPlan, Plan, Prediction, record_digest
from badam.profiling.record import BlockMeasurement, MeasuredRun, Measurement
from badam.vocabulary import STEP_PHASES, Category, Phase
from badam_planner.accuracy.comparison import (
    NOT_ATTRIBUTED,
    Accuracy,
    BlockRow,
    CategoryRow,
    Comparison,
    Pair,
    PhaseRow,
    TotalRow,
    Verdict,
)

EXACT_CATEGORIES = (Category.PARAMETER, Category.MASTER, Category.GRADIENT, Category.OPTIMIZER_STATE)
"""What a measurement can tell apart, because the run holds these tensors; the rest is one sum under ACTIVATION."""

PHASE_ORDER = (Phase.SETUP, *STEP_PHASES)


def compare(plan: Plan, run: MeasuredRun, *, tolerance: float = 0.05) -> Comparison:
    """Compare a plan's prediction with what a run of it measured.

    Args:
        plan: a plan with a prediction.
        run: a run of the same model configuration; other differences are noted, not refused.
        tolerance: largest accepted absolute error, as a fraction of the measured bytes.

    Raises:
        InputError: if the plan has no prediction, or the run is of another model.
    """
    prediction, measurement = plan.prediction, run.measurement
    if prediction is None:
        raise InputError(
            "The plan holds no prediction, so there is nothing to compare the run with.",
            advice=f"Write one that does: badam-plan {plan.model.id} --gpu {plan.target.gpu}.",
        )
    if plan.model.config_digest != run.model.config_digest:
        raise InputError(
            f"The plan is for {plan.model.id} ({plan.model.parameters:,} parameters) and the run is of "
            f"{run.model.id} ({run.model.parameters:,} parameters); their configurations differ.",
            advice="Give the plan that the run was started with.",
        )
    totals = _total_rows(prediction, measurement)
    blocks = block_rows(plan.partition.blocks, measurement.blocks)
    device = measurement.peak_device_bytes
    return Comparison(
        plan=plan,
        run=run,
        totals=totals,
        phases=_phase_rows(prediction, measurement),
        categories=_category_rows(prediction, measurement),
        blocks=blocks,
        verdict=_judge(totals, blocks, tolerance),
        predicted_fits=prediction.peak_device_bytes <= plan.target.usable_bytes,
        measured_fits=None if device is None else device <= plan.target.usable_bytes,
        notes=tuple(_notes(plan, run, blocks)),
    )


def summarize(comparisons: Sequence[Comparison]) -> Accuracy:
    """The accuracy over several runs; ``comparisons`` must not be empty."""
    return Accuracy(
        comparisons=tuple(comparisons),
        median_error=statistics.median(_size(one.allocated) for one in comparisons),
        worst=max(comparisons, key=lambda one: _size(one.verdict.worst)),
        wrong_fits=sum(one.predicted_fits and one.measured_fits is False for one in comparisons),
        false_refusals=sum(not one.predicted_fits and one.measured_fits is True for one in comparisons),
        undecided=sum(one.measured_fits is None for one in comparisons),
    )


def plan_of(run: MeasuredRun, plans: Sequence[Plan]) -> Plan:
    """The plan among ``plans`` that ``run`` was started with; the first one where none carries its digest."""
    return next((plan for plan in plans if record_digest(plan) == run.plan_digest), plans[0])


def explain(comparison: Comparison) -> str:
    """One sentence on where the difference sits: the part that is most off, and whether the peak moved."""
    parts = [row for row in comparison.categories if row.memory.error_bytes is not None]
    part = max(parts, key=lambda row: abs(row.memory.error_bytes or 0), default=None)
    error = part.memory.error_bytes if part else None
    predicted, measured = comparison.prediction.peak_phase, comparison.measurement.peak_phase
    moved = "" if predicted is measured else f"; the peak was predicted in {predicted} and measured in {measured}"
    if part is None or not error:
        return f"every part is exact{moved}"
    return f"the part most off is {part.name}, predicted too {'high' if error > 0 else 'low'}{moved}"


def fold_categories(by_category: Mapping[Category, int]) -> dict[Category, int]:
    """Sum what a measurement cannot tell apart under ACTIVATION; the total does not change."""
    folded: dict[Category, int] = {}
    for category, size in by_category.items():
        kept = category if category in EXACT_CATEGORIES else Category.ACTIVATION
        folded[kept] = folded.get(kept, 0) + size
    return folded


def predicted_parts(prediction: Prediction) -> dict[str, int]:
    """The predicted peak by category, in the order of the vocabulary; what no category holds is ``not attributed``."""
    parts = {name.value: prediction.by_category[name] for name in Category if name in prediction.by_category}
    rest = prediction.peak_allocated_bytes - sum(parts.values())
    return {**parts, NOT_ATTRIBUTED: rest} if rest else parts


def block_rows(planned: Sequence[BlockPlan], seen: Sequence[BlockMeasurement] = ()) -> tuple[BlockRow, ...]:
    """One row per block, in the order of the plan; blocks that only the run knows come last."""
    plans = {block.name: block for block in planned}
    runs = {block.name: block for block in seen if block.steps}
    predicted_seconds = _scaled_backward(plans, runs)
    rows = []
    for name in dict.fromkeys([*plans, *runs]):
        plan, run = plans.get(name), runs.get(name)
        rows.append(
            BlockRow(
                name=name,
                memory=Pair(plan.peak_allocated_bytes if plan else None, run.peak_allocated_bytes if run else None),
                predicted_phase=plan.peak_phase if plan else None,
                measured_phase=run.peak_phase if run else None,
                steps=run.steps if run else 0,
                backward_seconds=_backward_seconds(run) if run else None,
                predicted_backward_seconds=predicted_seconds.get(name),
            )
        )
    return tuple(rows)


def _total_rows(prediction: Prediction, measurement: Measurement) -> tuple[TotalRow, ...]:
    return (
        TotalRow("allocated", Pair(prediction.peak_allocated_bytes, measurement.peak_allocated_bytes)),
        TotalRow("reserved", Pair(prediction.peak_reserved_bytes, measurement.peak_reserved_bytes)),
        TotalRow("device", Pair(prediction.peak_device_bytes, measurement.peak_device_bytes)),
    )


def _phase_rows(prediction: Prediction, measurement: Measurement) -> tuple[PhaseRow, ...]:
    rows = (
        PhaseRow(
            phase,
            Pair(prediction.by_phase.get(phase), measurement.by_phase.get(phase)),
            measurement.seconds_by_phase.get(phase),
            prediction.seconds_by_phase.get(phase),
        )
        for phase in PHASE_ORDER
    )
    return tuple(row for row in rows if not (row.memory == Pair(None, None) and row.seconds is None))


def _category_rows(prediction: Prediction, measurement: Measurement) -> tuple[CategoryRow, ...]:
    predicted, measured = fold_categories(prediction.by_category), fold_categories(measurement.by_category)
    rows = [
        CategoryRow(category, Pair(predicted.get(category, 0), measured.get(category, 0)))
        for category in (*EXACT_CATEGORIES, Category.ACTIVATION)
        if category in predicted or category in measured
    ]
    # Either record may have been made by code that counts a part twice or leaves one out; the difference gets a row
    # of its own, so that the parts shown always sum to the totals shown.
    rest = Pair(
        prediction.peak_allocated_bytes - sum(predicted.values()),
        measurement.peak_allocated_bytes - sum(measured.values()),
    )
    return tuple(rows if rest == Pair(0, 0) else [*rows, CategoryRow(None, rest)])


def _backward_seconds(block: BlockMeasurement) -> float | None:
    """Backward as a user waits for it: the recomputation inside it included."""
    parts = [block.seconds_by_phase.get(phase) for phase in (Phase.BACKWARD, Phase.RECOMPUTE)]
    return None if parts[0] is None else sum(part for part in parts if part is not None)


def _scaled_backward(plans: Mapping[str, BlockPlan], runs: Mapping[str, BlockMeasurement]) -> dict[str, float]:
    """Predicted backward seconds by block name; empty where nothing gives a scale."""
    relative: dict[str, float] = {}
    measured = 0.0
    for name, run in runs.items():
        work = plans[name].backward_relative if name in plans else None
        seconds = _backward_seconds(run)
        if work is not None and seconds is not None:
            relative[name] = work
            measured += seconds
    total = sum(relative.values())
    return {name: work * measured / total for name, work in relative.items()} if total else {}


def _judge(totals: Sequence[TotalRow], blocks: Sequence[BlockRow], tolerance: float) -> Verdict:
    judged = [(row.name, row.memory) for row in totals] + [(f"block {row.name}", row.memory) for row in blocks]
    name, worst = max(
        ((name, pair) for name, pair in judged if pair.error_bytes is not None), key=lambda one: _size(one[1])
    )
    return Verdict(tolerance, name, worst, _size(worst) <= tolerance)


def _size(pair: Pair) -> float:
    """The absolute error as a fraction; infinite where something was predicted and nothing measured."""
    fraction = pair.error_fraction
    return float("inf") if fraction is None else abs(fraction)


def _notes(plan: Plan, run: MeasuredRun, blocks: Sequence[BlockRow]) -> Iterable[str]:
    if run.plan_digest != record_digest(plan):
        yield "The run was started with another plan file (digests differ); compare with care."
    for name, ours, theirs in _settings(plan, run):
        if ours != theirs:
            yield f"{name}: the plan says {ours}, the run used {theirs}."
    if run.machine.device == "cpu" and plan.target.gpu != "cpu":
        yield f"The plan is for {plan.target.gpu}, the run was on a CPU: only allocated bytes compare."
    elif run.measurement.peak_reserved_bytes is None:
        yield "This device's allocator reserves nothing: only allocated bytes compare."
    unseen = sum(row.steps == 0 for row in blocks)
    if unseen:
        yield f"{unseen} of {len(blocks)} blocks were not visited, so their peaks were not measured."


def _settings(plan: Plan, run: MeasuredRun) -> Iterable[tuple[str, object, object]]:
    yield "method", plan.method, run.method
    for field in type(plan.training).model_fields:
        yield field, getattr(plan.training, field), getattr(run.training, field)

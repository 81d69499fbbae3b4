"""What the HTML report draws beyond plan and run, fetched from outside: a rehearsal, and a run's log of its steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from badam.plan import Plan
from badam.profiling.modules.record import MODULES_FILE, ModuleTimelines, load_module_timelines
from badam.vocabulary import Phase
from badam_planner.report.html.model import CurvePoint, StepTimeline, TrainingCurve, sample_timeline
from badam_planner.search.result import SizeMap

METRICS_FILE = "metrics.jsonl"
"""Beside a measured run: one JSON object per optimizer step, with its step, loss and active block."""


def rehearse_step(plan: Plan) -> StepTimeline:
    """The memory of one step while the plan's worst block is active, from the first forward of its visit on.

    Imports torch and takes seconds.

    The limit leaves out what no timeline holds: the device context, the communication library and the workspace of
    matrix multiplication.

    Raises:
        BadamError: if the model of the plan cannot be rehearsed.
    """
    from badam_planner.recording.caching_allocator import ROUNDING
    from badam_planner.recording.timeline import Timeline
    from badam_planner.rehearsal.evaluator import Evaluator
    from badam_planner.rehearsal.model_tree import inspect_model

    names = [block.name for block in plan.partition.blocks]
    worst = plan.prediction.peak_block if plan.prediction else names[0]
    tree = inspect_model(plan.model, plan.training.attention)
    recording = Evaluator(tree).recording(plan, names.index(worst) if worst in names else 0)
    granularity = 1 if plan.target.gpu == "cpu" else ROUNDING
    start = next((tick for tick, phase in recording.phase_starts if phase is Phase.FORWARD), 0)
    return sample_timeline(
        Timeline(recording, tree.head_module, granularity=granularity, on_gpu=granularity > 1),
        title=f"One step with block {worst} active",
        limit_bytes=plan.target.usable_bytes - plan.target.outside_bytes - plan.target.workspace_bytes,
        start=start,
    )


def sizes_that_fit(plan: Plan, progress: Callable[[str], None] = lambda _text: None) -> SizeMap:
    """What fits at batch sizes and lengths around those of the plan.

    Imports torch; takes a rehearsal of a second or less for each of some thirty sizes.

    Raises:
        BadamError: if the model of the plan cannot be rehearsed.
    """
    from badam_planner.rehearsal.evaluator import Evaluator
    from badam_planner.rehearsal.model_tree import inspect_model
    from badam_planner.search.size_map import map_sizes

    return map_sizes(plan, Evaluator(inspect_model(plan.model, plan.training.attention)), progress)


def read_modules(measured: Path, plan_digest: str) -> ModuleTimelines | None:
    """What a run in full mode left beside its measured record; None where there is nothing of the same plan.

    Raises:
        PlanError: if it cannot be read.
    """
    path = measured.parent / MODULES_FILE
    if not path.is_file():
        return None
    timelines = load_module_timelines(path)
    return timelines if timelines.plan_digest == plan_digest else None  # of an earlier run in the same directory


def read_curve(measured: Path) -> TrainingCurve | None:
    """The loss over the steps of a run, from the log beside its measured record; None where there is none.

    A run that was killed leaves a torn last line, one that was resumed logs a step twice: what cannot be read is left
    out, and of two records of a step the later one counts.
    """
    path = measured.parent / METRICS_FILE
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    points: dict[int, CurvePoint] = {}
    for line in lines:
        try:
            record = json.loads(line)
            point = CurvePoint(int(record["step"]), float(record["loss"]), str(record.get("block") or ""))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        points[point.step] = point
    if not points:
        return None
    return TrainingCurve(measured.parent.name, tuple(points[step] for step in sorted(points)))

"""Trying the settings of one partition, fastest first."""

from __future__ import annotations

from collections.abc import Callable

from badam.plan import Plan
from badam.vocabulary import Strategy
from badam_planner.rehearsal.evaluator import Evaluator, PlanForecast
from badam_planner.rehearsal.model_tree import ModelTree
from badam_planner.search.request import Request, staged_plan
from badam_planner.search.settings import MemorySetting, first_fitting, ladder

Progress = Callable[[str], None]


def first_that_fits(
    request: Request, strategy: Strategy, evaluator: Evaluator, progress: Progress
) -> tuple[Plan, PlanForecast]:
    """The fastest setting of a partition that fits, or the leanest one, which is the ladder's last."""
    *faster, leanest = settings_of(request, evaluator.tree)

    def plan_with(setting: MemorySetting) -> Plan:
        progress(f"rehearsing {strategy} blocks, {in_words(setting)}")
        return staged_plan(request, strategy, setting, evaluator.tree)

    def attempt(setting: MemorySetting) -> tuple[Plan, PlanForecast] | None:
        plan = plan_with(setting)
        forecast = evaluator.worst_block(plan, give_up_above=request.target.usable_bytes)
        return None if forecast is None else (plan, forecast)

    _, found = first_fitting(faster, attempt)
    if found is not None:
        return found
    plan = plan_with(leanest)
    return plan, evaluator.worst_block(plan)


def fits_at_its_leanest(request: Request, strategy: Strategy, evaluator: Evaluator) -> bool:
    """Whether a partition fits with the ladder's last setting; found out with its first block that is too large."""
    leanest = settings_of(request, evaluator.tree)[-1]
    plan = staged_plan(request, strategy, leanest, evaluator.tree)
    return evaluator.worst_block(plan, give_up_above=request.target.usable_bytes) is not None


def settings_of(request: Request, tree: ModelTree) -> tuple[MemorySetting, ...]:
    """The settings that the request leaves open; the CPU's allocator has no segments."""
    grows = "off" if request.target.gpu == "cpu" else request.expandable_segments
    return ladder(request.checkpointing, request.loss, tree.can_chunk, expandable_segments=grows)


def in_words(setting: MemorySetting) -> str:
    """A setting as messages name it."""
    words = f"checkpointing {setting.checkpointing}, {setting.loss} loss"
    return f"{words}, expandable segments" if setting.expandable_segments else words


def headroom(request: Request, forecast: PlanForecast) -> int:
    """Usable bytes less the device peak; negative if that is too much."""
    return request.target.usable_bytes - forecast.worst.peak_device_bytes

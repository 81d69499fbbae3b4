"""What is predicted for processes on the CPU, against the allocator's own reports in processes that send over gloo."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

from badam_planner.recording.timeline import Timeline
from badam_planner.rehearsal.evaluator import Evaluator
from tests.badam.distributed import step_memory_jobs as jobs
from tests.badam.distributed.workers import results_of
from tests.badam_planner.rehearsal import test_evaluator_gpus as fsdp2_tests
from tests.badam_planner.rehearsal import test_evaluator_zero3

Cases = dict[str, tuple[Any, Evaluator, int]]
"""A plan, what rehearses it, and the active block."""


def fsdp2_cases(processes: int) -> Cases:
    """Those of :mod:`tests.badam_planner.rehearsal.test_evaluator_gpus` for so many processes."""
    return {
        name: (*fsdp2_tests.planned(count, settings), block)
        for name, (count, block, settings) in fsdp2_tests.CASES.items()
        if count == processes
    }


def zero3_cases(processes: int) -> Cases:
    """Those of :mod:`tests.badam_planner.rehearsal.test_evaluator_zero3` for so many processes."""
    return {
        name: (*test_evaluator_zero3.planned(count, settings, layers=layers), block)
        for name, (count, layers, block, settings) in test_evaluator_zero3.CASES.items()
        if count == processes
    }


def errors_of(processes: int, cases: Cases, measure: Callable[..., Any]) -> dict[str, float]:
    """By case, how far the peak of the fullest process is from the prediction, relative to it."""
    requests = {
        name: (measure, {"plan_json": plan.model_dump_json(), "block": block})
        for name, (plan, _, block) in cases.items()
    }
    found = results_of(processes, requests)
    errors = {}
    for name, (plan, evaluator, block) in cases.items():
        predicted = Timeline(evaluator.recording(plan, block), evaluator.tree.head_module).peak().nbytes
        errors[name] = max(each[name]["peak"] for each in found) / predicted - 1
    return errors


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_peak_of_processes_under_fsdp2_is_predicted_within_one_percent(processes: int) -> None:
    errors = errors_of(processes, fsdp2_cases(processes), jobs.llama_peak)
    assert len(errors) >= 2
    assert {name: error for name, error in errors.items() if abs(error) > 0.01} == {}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_the_peak_of_processes_under_zero3_is_predicted_within_ten_percent(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed asks for messages ahead: when gloo's threads come to copy them differs from run to run."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    errors = errors_of(processes, zero3_cases(processes), jobs.zero3_peak)
    assert len(errors) >= 2
    assert {name: error for name, error in errors.items() if abs(error) > 0.10} == {}

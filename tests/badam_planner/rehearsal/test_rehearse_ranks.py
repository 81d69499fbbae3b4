"""FSDP2 itself on fake tensors, against the allocator's own reports in a process that believes to be one of many."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from badam_planner.composition.short_rehearsal import Rehearsal, Rehearsed
from badam_planner.recording.recording import GIVEN, NEVER, Recording
from badam_planner.recording.timeline import Timeline
from badam_planner.rehearsal.evaluator import Evaluator
from badam_planner.rehearsal.rehearse_ranks import rehearse_rank
from tests.badam_planner.multi_gpu.targets import gpus_of
from tests.badam_planner.rehearsal.plans import plan_of
from tests.badam_planner.rehearsal.test_evaluator_gpus import CASES, WIDER, found_alone, planned

FAST = ("two processes, middle block", "two copies, accumulated")


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, Any]]:
    requests = [
        {"processes": processes, "plan": planned(processes, settings)[0].model_dump_json(), "block": block}
        for processes, block, settings in CASES.values()
    ]
    return dict(zip(CASES, found_alone(requests), strict=True))


@pytest.mark.parametrize(
    "case", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_the_peak_of_one_process_is_that_of_its_rehearsal(case: str, measured: dict[str, Any]) -> None:
    processes, block, settings = CASES[case]
    plan, evaluator = planned(processes, settings)
    recording = rehearse_rank(plan, block, layers=evaluator.tree.layers)
    assert Timeline(recording).peak().nbytes == pytest.approx(measured[case]["peak"], rel=0.005)


def events(recording: Recording) -> list[Any]:
    """All that happens, in order; of weights that are not there, whose turn it is does not matter."""
    found = []
    for one in recording.allocations:
        what = replace(one, born=0, died=0, owner="" if one.operation == GIVEN else one.owner)
        found += [(one.born, what)] + [(one.died, what)] * (one.died != NEVER)
    return [event for _, event in sorted(found, key=lambda pair: pair[0])]


def test_a_few_layers_compose_to_what_full_depth_does_streams_included() -> None:
    plan, tree = plan_of(WIDER, 8, target=gpus_of("fsdp2", 2))
    evaluator = Evaluator(tree)
    _, runs = evaluator._key_and_runs(plan, 2)
    assert [len(run.cycles) for run in runs] == [5]
    short = rehearse_rank(plan, 2, layers=tree.layers, **evaluator._left_out(runs))
    composed = Rehearsal(Rehearsed.of(short, tree.layers, runs), tree.layers, runs).recording()
    full = rehearse_rank(plan, 2, layers=tree.layers)
    assert len(short.allocations) < len(full.allocations)
    assert events(composed) == events(full)
    assert {one.stream for one in full.allocations} == {0, 1, 2}


def test_a_rehearsal_leaves_no_process_group_behind() -> None:
    plan, tree = plan_of(WIDER, 2, target=gpus_of("fsdp2", 2))
    rehearse_rank(plan, 0, layers=tree.layers)
    assert not dist.is_initialized()

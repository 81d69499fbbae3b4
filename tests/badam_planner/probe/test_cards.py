"""What is predicted for one of several cards, against FSDP2 itself and the allocator's own reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from badam.errors import InputError
from badam.plan import Plan, Target
from badam_planner.links import LINKS, transfer_times
from badam_planner.planning import Request, make_plan
from badam_planner.probe.cards import CardsEvaluator, smallest_number
from badam_planner.timeline import Timeline
from tests.badam.distributed import step_memory_jobs as jobs
from tests.badam.distributed.workers import ROOT, on_ranks
from tests.badam_planner.probe.plans import CPU, LLAMA, plan_of, spec_of

WIDER = {**LLAMA, "hidden_size": 128, "intermediate_size": 320, "vocab_size": 512}
DEPTH = 5

CASES: dict[str, tuple[int, int, dict[str, Any]]] = {  # processes, active block, what the plan has
    "two processes, lowest block": (2, 0, {}),
    "two processes, middle block": (2, 2, {}),
    "checkpointed": (2, 2, {"checkpointing": True}),
    "fp32": (2, 0, {"dtype": "float32"}),
    "accumulated": (2, 2, {"grad_accum": 2}),
    "long": (2, 0, {"seq_len": 128}),
    "eight processes": (8, 0, {}),
    "eight processes, long": (8, 2, {"seq_len": 128}),
    "rows that do not divide": (3, 2, {"seq_len": 64}),
}


def planned(processes: int, settings: dict[str, Any], engine: str = "fsdp2") -> tuple[Plan, CardsEvaluator]:
    target = CPU.model_copy(update={"engine": engine, "num_gpus": processes})
    plan, tree = plan_of(WIDER, DEPTH, target=target, **settings)
    return plan, CardsEvaluator(tree)


def found_alone(requests: list[dict[str, Any]], **environment: str) -> list[dict[str, Any]]:
    """What a process found that believes to be one of many, see tests.badam.distributed.alone."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.badam.distributed.alone"],
        input=json.dumps(requests),
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, Any]]:
    requests = [
        {"processes": processes, "plan": planned(processes, settings)[0].model_dump_json(), "block": block}
        for processes, block, settings in CASES.values()
    ]
    return dict(zip(CASES, found_alone(requests), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_the_peak_of_one_process_is_predicted_within_five_percent(case: str, measured: dict[str, Any]) -> None:
    processes, block, settings = CASES[case]
    plan, evaluator = planned(processes, settings)
    predicted = Timeline(evaluator.recording(plan, block), evaluator.tree.head_module).peak().nbytes
    assert predicted == pytest.approx(measured[case]["peak"], rel=0.05)


@pytest.mark.parametrize("case", CASES)
def test_the_bytes_of_a_step_are_predicted_and_less_than_those_of_full_training(
    case: str, measured: dict[str, Any]
) -> None:
    processes, block, settings = CASES[case]
    plan, evaluator = planned(processes, settings)
    traffic = evaluator.traffic(plan, block)
    assert traffic is not None
    own, full = traffic
    assert own.sent_bytes(processes) == pytest.approx(measured[case]["sent"], rel=0.001)
    assert own.gathers == measured[case]["counts"]["_allgather_base_"]
    assert own.reduces == measured[case]["counts"]["_reduce_scatter_base_"]
    assert own.sent_bytes(processes) < full.sent_bytes(processes)


@pytest.mark.slow
def test_full_training_sends_what_is_predicted_for_it_and_blocks_less_also_over_gloo() -> None:
    plan, evaluator = planned(2, {})
    traffic = evaluator.traffic(plan, 0)
    assert traffic is not None
    blocks = on_ranks(2, jobs.llama_peak, plan_json=plan.model_dump_json(), block=0)[0]["sent"]
    everything = on_ranks(2, jobs.llama_sent_by_full_training, plan_json=plan.model_dump_json())[0]
    assert traffic[0].sent_bytes(2) == pytest.approx(blocks, rel=0.001)
    assert traffic[1].sent_bytes(2) == pytest.approx(everything, rel=0.1)
    assert blocks < everything


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_states_shrink_with_the_number_of_cards(engine: str) -> None:
    peaks = []
    for cards in (1, 2, 8, 64) if engine == "fsdp2" else (2, 8, 64):
        plan, evaluator = planned(cards, {}, engine)
        peaks.append(evaluator.peaks(plan, 0).peak_allocated_bytes)
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(peaks)


def test_copies_need_room_for_one_message_and_send_the_active_block() -> None:
    plan, tree = plan_of(WIDER, DEPTH)
    copies = plan.model_copy(update={"target": plan.target.model_copy(update={"engine": "ddp", "num_gpus": 4})})
    evaluator = CardsEvaluator(tree)
    assert evaluator.peaks(copies, 0).peak_allocated_bytes >= evaluator.peaks(plan, 0).peak_allocated_bytes
    traffic = evaluator.traffic(copies, 0)
    assert traffic is not None
    entries = plan.partition.blocks[0].parameters
    assert traffic[0].sent_bytes(4) == round(2 * 4 * entries * 3 / 4)


@pytest.mark.parametrize("wanted", [1, 2, 3, 7, 8, 100])
def test_the_smallest_number_of_cards_is_found(wanted: int) -> None:
    assert smallest_number(lambda cards: cards >= wanted) == wanted


def test_no_number_of_cards_is_found_where_none_fits() -> None:
    assert smallest_number(lambda _: False) is None


def test_a_plan_is_made_for_the_fewest_cards_that_fit_and_not_for_one_less() -> None:
    plan, evaluator = planned(1, {})
    needed = evaluator.worst_block(planned(3, {})[0]).worst.peak_device_bytes
    target = Target(gpu="cpu", total_bytes=needed, usable_bytes=needed, engine="fsdp2")
    request = Request(
        spec=spec_of(WIDER, DEPTH).model_copy(update={"parameters": plan.model.parameters}),
        target=target,
        partition="layer",
        batch_size=2,
        seq_len=24,
        checkpointing="none",
        loss="full",
    )
    answer = make_plan(Request(**{**vars_of(request), "find_num_gpus": True}))
    assert answer.plan is not None
    assert answer.plan.target.num_gpus == 3
    assert answer.plan.prediction is not None
    assert answer.plan.prediction.sent_bytes < answer.plan.prediction.sent_bytes_of_full
    fewer = target.model_copy(update={"num_gpus": 2})
    assert make_plan(Request(**{**vars_of(request), "target": fewer})).plan is None


def vars_of(request: Request) -> dict[str, Any]:
    return {name: getattr(request, name) for name in request.__slots__}


def test_other_methods_are_refused_for_several_cards() -> None:
    with pytest.raises(InputError, match="Only --method badam"):
        Request(spec=spec_of(LLAMA, 2), target=CPU.model_copy(update={"engine": "fsdp2"}), method="lora")


def test_a_ring_that_leaves_a_node_is_as_slow_as_the_link_between_nodes() -> None:
    inside = dict(transfer_times(10**9, 8, 8))
    assert inside[LINKS[0].name] == pytest.approx(1e9 / LINKS[0].bytes_per_second)
    assert max(inside.values()) > min(inside.values())
    outside = transfer_times(10**9, 16, 8)
    assert all(time >= 1e9 / 50e9 for _, time in outside)

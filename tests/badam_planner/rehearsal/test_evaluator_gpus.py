"""What is predicted for one of several cards, against FSDP2 itself and the allocator's own reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from badam.errors import InputError
from badam.plan import Plan, Target
from badam.vocabulary import Category, Phase
from badam_planner.multi_gpu.gpu_count import MOST_GPUS
from badam_planner.recording.recording import NEVER, Recording, TensorRole
from badam_planner.recording.timeline import Timeline
from badam_planner.rehearsal.evaluator import Evaluator
from badam_planner.search.planner import Request, make_plan
from tests.badam.distributed import step_memory_jobs as jobs
from tests.badam.distributed.workers import ROOT, on_ranks
from tests.badam_planner.multi_gpu.targets import gpus_of, on_a100
from tests.badam_planner.rehearsal.plans import CPU, LLAMA, plan_of, spec_of

WIDER = {**LLAMA, "hidden_size": 128, "intermediate_size": 320, "vocab_size": 512}
DEPTH = 5

CASES: dict[str, tuple[int, int, dict[str, Any]]] = {  # processes, active block, what the plan has
    "two processes, lowest block": (2, 0, {}),
    "two processes, middle block": (2, 2, {}),
    "checkpointed": (2, 2, {"checkpointing": True}),
    "fp32": (2, 0, {"dtype": "float32"}),
    "accumulated": (2, 2, {"grad_accum": 2}),
    "accumulated, highest block": (2, 4, {"grad_accum": 2, "seq_len": 8}),
    "four processes, accumulated, highest block": (4, 4, {"grad_accum": 2, "seq_len": 8}),
    "long": (2, 0, {"seq_len": 128}),
    "eight processes": (8, 0, {}),
    "eight processes, long": (8, 2, {"seq_len": 128}),
    "rows that do not divide": (3, 2, {"seq_len": 64}),
}
SEVERAL_COPIES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "two copies": (4, 0, {"shard_size": 2}),
    "two copies, accumulated": (4, 2, {"shard_size": 2, "grad_accum": 3}),
    "four copies, fp32, checkpointed": (8, 2, {"shard_size": 2, "dtype": "float32", "checkpointing": True}),
    "two copies, fp32, accumulated": (4, 0, {"shard_size": 2, "dtype": "float32", "grad_accum": 2}),
    "two copies, rows that do not divide": (6, 0, {"shard_size": 3, "seq_len": 64}),
}
CASES |= SEVERAL_COPIES


def planned(processes: int, settings: dict[str, Any], engine: str = "fsdp2") -> tuple[Plan, Evaluator]:
    cards = {"engine": engine, "num_gpus": processes, "shard_size": settings.get("shard_size")}
    others = {name: value for name, value in settings.items() if name != "shard_size"}
    plan, tree = plan_of(WIDER, DEPTH, target=CPU.model_copy(update=cards), **others)
    return plan, Evaluator(tree)


def recorded(plan: Plan, evaluator: Evaluator, block: int) -> Recording:
    """A block's recording without the copies of gloo, which a process that is alone does not have."""
    recording = evaluator.recording(plan, block)
    kept = [each for each in recording.allocations if each.role is not TensorRole.GLOO_COPY]
    assert len(kept) < len(recording.allocations)
    return replace(recording, allocations=kept)


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
    predicted = Timeline(recorded(plan, evaluator, block), evaluator.tree.head_module).peak().nbytes
    assert predicted == pytest.approx(measured[case]["peak"], rel=0.05)


@pytest.mark.parametrize("case", CASES)
def test_a_plan_shows_the_peak_of_its_timeline(case: str) -> None:
    processes, block, settings = CASES[case]
    plan, evaluator = planned(processes, settings)
    peak = Timeline(evaluator.recording(plan, block), evaluator.tree.head_module).peak().nbytes
    assert evaluator.peaks(plan, block).peak_allocated_bytes == peak


@pytest.mark.parametrize("case", CASES)
def test_the_bytes_of_a_step_are_predicted_and_less_than_those_of_full_training(
    case: str, measured: dict[str, Any]
) -> None:
    processes, block, settings = CASES[case]
    plan, evaluator = planned(processes, settings)
    traffic = evaluator.traffic(plan, block)
    assert traffic is not None
    own, full = traffic
    shards, replicas = plan.target.shards, plan.target.replicas
    assert own.sent_bytes(shards, replicas) == pytest.approx(measured[case]["sent"], rel=0.001)
    assert own.sent_bytes(shards, replicas) < full.sent_bytes(shards, replicas)
    assert own.gathers == measured[case]["counts"]["_allgather_base_"]
    assert own.reduces == measured[case]["counts"]["_reduce_scatter_base_"]


@pytest.mark.parametrize("case", SEVERAL_COPIES)
def test_copies_that_are_cut_average_their_parts_of_the_active_block_once_per_step(
    case: str, measured: dict[str, Any]
) -> None:
    processes, block, settings = CASES[case]
    plan, evaluator = planned(processes, settings)
    traffic = evaluator.traffic(plan, block)
    assert traffic is not None
    between = measured[case]["by_kind"]["allreduce_"]
    assert traffic[0].sent_between_bytes(plan.target.replicas) == pytest.approx(between, rel=0.001)


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
    evaluator = Evaluator(tree)
    assert evaluator.peaks(copies, 0).peak_allocated_bytes >= evaluator.peaks(plan, 0).peak_allocated_bytes
    traffic = evaluator.traffic(copies, 0)
    assert traffic is not None
    entries = plan.partition.blocks[0].parameters
    assert traffic[0].sent_bytes(1, 4) == round(2 * 4 * entries * 3 / 4)


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
    answer = make_plan(replace(request, find_num_gpus=True))
    assert answer.plan is not None
    assert answer.plan.target.num_gpus == 3
    assert answer.plan.prediction is not None
    assert answer.plan.prediction.sent_bytes < answer.plan.prediction.sent_bytes_of_full
    fewer = target.model_copy(update={"num_gpus": 2})
    assert make_plan(replace(request, target=fewer)).plan is None


def test_other_methods_are_refused_for_several_cards() -> None:
    with pytest.raises(InputError, match="Only --method badam"):
        make_plan(Request(spec=spec_of(LLAMA, 2), target=CPU.model_copy(update={"engine": "fsdp2"}), method="lora"))


def test_copies_are_cut_over_the_fewest_cards_that_do() -> None:
    plan, evaluator = planned(8, {"checkpointing": True, "shard_size": 4})
    needed = evaluator.worst_block(plan).worst.peak_device_bytes
    target = gpus_of("fsdp2", 16).model_copy(update={"total_bytes": needed, "usable_bytes": needed})
    request = Request(
        spec=spec_of(WIDER, DEPTH).model_copy(update={"parameters": plan.model.parameters}),
        target=target,
        partition="layer",
        batch_size=2,
        seq_len=24,
        checkpointing="all",
        loss="full",
        find_shard_size=True,
    )
    found, whole = make_plan(request).plan, make_plan(replace(request, find_shard_size=False)).plan
    assert found is not None
    assert found.prediction is not None
    assert whole is not None
    assert whole.prediction is not None
    assert (found.target.num_gpus, found.target.shard_size) == (16, 4)
    assert found.prediction.sent_between_bytes
    assert found.prediction.formula_bytes == pytest.approx(4 * whole.prediction.formula_bytes, abs=4)


def test_what_copies_average_stays_to_the_end_of_backward() -> None:
    plan, evaluator = planned(4, {"shard_size": 2, "grad_accum": 3})
    # Of a label for several allocations the last is kept: the one that stays longest.
    allocations = sorted(evaluator.recording(plan, 2).allocations, key=lambda each: each.died)
    held = {each.label: each for each in allocations if each.label}
    entries = sum(info.numel for info in evaluator.tree.parameters if info.name.startswith("model.layers.2.")) // 2
    assert held["averaged over the copies"].nbytes == held["sum over the batches"].nbytes == 4 * entries
    assert held["sum over the batches"].died > held["averaged over the copies"].born
    assert held["averaged over the copies"].died > held["gradient of model.layers.2"].born


@pytest.mark.parametrize(("engine", "shard_size"), [("fsdp2", None), ("fsdp2", 2), ("zero3", None)])
def test_messages_are_there_in_forward_and_backward_only(engine: str, shard_size: int | None) -> None:
    plan, evaluator = planned(4, {"shard_size": shard_size, "grad_accum": 2}, engine)
    recording = evaluator.recording(plan, 0)
    first = min(tick for tick, phase in recording.phase_starts if phase is Phase.FORWARD)
    steps = [tick for tick, phase in recording.phase_starts if phase is Phase.STEP]
    messages = [each for each in recording.allocations if each.category is Category.WORKSPACE and each.died != NEVER]
    assert steps
    assert len(messages) > 10
    assert min(each.born for each in messages) >= first
    assert [each.label for each in messages for step in steps if each.born < step < each.died] == []


def test_nccls_buffers_are_on_the_device_and_not_in_torch() -> None:
    plan, evaluator = planned(4, {})
    bare = plan.model_copy(update={"target": on_a100(4).model_copy(update={"communication_bytes": 0})})
    counted = plan.model_copy(update={"target": on_a100(4)})
    without, with_buffers = (evaluator.worst_block(each).worst for each in (bare, counted))
    assert with_buffers.peak_device_bytes - without.peak_device_bytes == 688 * 2**20
    assert with_buffers.peak_reserved_bytes == without.peak_reserved_bytes
    assert evaluator.worst_block(counted, give_up_above=without.peak_device_bytes) is None


def test_the_number_of_cards_that_is_found_leaves_room_for_nccl() -> None:
    plan, evaluator = planned(2, {"checkpointing": True})
    two = evaluator.worst_block(plan.model_copy(update={"target": on_a100(2)})).worst.peak_device_bytes
    request = Request(
        spec=spec_of(WIDER, DEPTH).model_copy(update={"parameters": plan.model.parameters}),
        target=gpus_of("fsdp2", 1).model_copy(update={"gpu": "a100-80gb", "total_bytes": two, "usable_bytes": two - 1}),
        partition="layer",
        batch_size=2,
        seq_len=24,
        loss="full",
        expandable_segments="off",
        find_num_gpus=True,
    )
    planned_for = make_plan(request).plan
    assert planned_for is not None
    assert planned_for.target.num_gpus == 1, "one card has no NCCL, and two would need more than one"
    assert planned_for.target.engine == "single"


def test_what_no_number_of_cards_can_hold_is_refused_with_what_each_would_hold() -> None:
    target = on_a100(2).model_copy(update={"total_bytes": 2**20, "usable_bytes": 2**20, "communication_bytes": 0})
    request = Request(spec=spec_of(WIDER, DEPTH).model_copy(update={"parameters": 2**20}), target=target, seq_len=24)
    fixed = make_plan(request).refusal
    assert fixed is not None
    assert "cut over 2 cards" in fixed.message
    assert "the weights alone take 1.00 MiB on each card" in str(fixed)
    assert "Choose a larger card, more cards (--num-gpus auto) or a smaller model." in str(fixed)
    found = make_plan(replace(request, find_num_gpus=True)).refusal
    assert found is not None
    assert f"cut over {MOST_GPUS} cards" in found.message
    assert "Choose a larger card or a smaller model." in str(found)

"""What is predicted for one of several cards under ZeRO-3, against DeepSpeed itself and the allocator's own reports."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from badam.plan import Plan
from badam.vocabulary import Category
from badam_planner.multi_gpu.zero3 import on_host
from badam_planner.recording.timeline import Timeline
from badam_planner.rehearsal.evaluator import Evaluator
from tests.badam_planner.rehearsal.plans import CPU, plan_of
from tests.badam_planner.rehearsal.test_evaluator_gpus import WIDER, found_alone, recorded

CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {  # processes, layers, active block, what the plan has
    "two processes, lowest block": (2, 5, 0, {}),
    "two processes, middle block": (2, 5, 2, {}),
    "checkpointed, lowest block": (2, 5, 0, {"checkpointing": True}),
    "checkpointed, middle block": (2, 5, 2, {"checkpointing": True}),
    "checkpointed, highest block": (2, 5, 4, {"checkpointing": True}),
    "fp32": (2, 5, 0, {"dtype": "float32"}),
    "accumulated": (2, 5, 2, {"grad_accum": 2}),
    "long": (2, 5, 0, {"seq_len": 128}),
    "four processes": (4, 5, 2, {}),
    "four processes, eight layers": (4, 8, 5, {"checkpointing": True}),
    "eight processes, long": (8, 5, 2, {"seq_len": 128}),
    "rows that do not divide": (3, 5, 2, {"seq_len": 64}),
    "chunked": (2, 5, 2, {"loss": "chunked", "seq_len": 200}),
    "chunked and checkpointed": (4, 5, 1, {"loss": "chunked", "seq_len": 128, "checkpointing": True}),
    "tied": (2, 5, 2, {"tied": True}),
}

OFFLOADED: dict[str, tuple[str, dict[str, Any]]] = {
    "optimizer": ("optimizer", {}),
    "optimizer, fp32": ("optimizer", {"dtype": "float32"}),
    "all": ("all", {}),
    "all, checkpointed": ("all", {"checkpointing": True}),
    "all, accumulated": ("all", {"grad_accum": 2}),
}


def planned(
    processes: int, settings: dict[str, Any], *, layers: int = 5, offload: str = "none"
) -> tuple[Plan, Evaluator]:
    settings = dict(settings)
    config = {**WIDER, "tie_word_embeddings": settings.pop("tied", False)}
    target = CPU.model_copy(update={"engine": "zero3", "num_gpus": processes, "offload": offload})
    plan, tree = plan_of(config, layers, target=target, **settings)
    return plan, Evaluator(tree)


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, Any]]:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    requests = [
        {"processes": processes, "plan": planned(processes, settings, layers=layers)[0].model_dump_json(), "block": b}
        for processes, layers, b, settings in CASES.values()
    ]
    for offload, settings in OFFLOADED.values():
        plan, _ = planned(2, settings, offload=offload)
        requests.append({"processes": 2, "plan": plan.model_dump_json(), "block": 2})
    return dict(zip([*CASES, *OFFLOADED], found_alone(requests, DS_ACCELERATOR="cpu"), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_deepspeeds_peak_is_predicted_within_two_percent(case: str, measured: dict[str, Any]) -> None:
    processes, layers, block, settings = CASES[case]
    plan, evaluator = planned(processes, settings, layers=layers)
    predicted = Timeline(recorded(plan, evaluator, block), evaluator.tree.head_module).peak().nbytes
    assert predicted == pytest.approx(measured[case]["peak"], rel=0.02)


@pytest.mark.parametrize("case", CASES)
def test_deepspeeds_messages_are_predicted_and_less_than_those_of_full_training(
    case: str, measured: dict[str, Any]
) -> None:
    processes, layers, block, settings = CASES[case]
    plan, evaluator = planned(processes, settings, layers=layers)
    traffic = evaluator.traffic(plan, block)
    assert traffic is not None
    own, full = traffic
    assert own.sent_bytes(processes) == pytest.approx(measured[case]["sent"], rel=0.05)
    assert own.sent_bytes(processes) < full.sent_bytes(processes)


@pytest.mark.parametrize("case", OFFLOADED)
def test_what_deepspeed_keeps_on_the_host_and_what_remains_are_predicted(case: str, measured: dict[str, Any]) -> None:
    """Both are the same memory here: the host has what DeepSpeed's own fields hold of the states, the card the rest."""
    offload, settings = OFFLOADED[case]
    plan, evaluator = planned(2, settings, offload=offload)
    found, owned = measured[case], measured[case]["owned"]
    on_the_host = sum(owned[kind] for kind in ("master", "optimizer state", "gradient"))
    if offload == "all":
        on_the_host += owned["parameter"]
    assert evaluator.host_bytes(plan) == pytest.approx(on_the_host, rel=0.001)
    gpu = plan.model_copy(update={"target": plan.target.model_copy(update={"gpu": "a100-80gb"})})
    evaluator = Evaluator(evaluator.tree)
    recording = evaluator.recording(gpu, 2)
    assert not [each for each in recording.allocations if "host memory" in (each.label or "")]
    together = Timeline(recorded(plan, Evaluator(evaluator.tree), 2), evaluator.tree.head_module).peak().nbytes
    assert together == pytest.approx(found["peak"], rel=0.02)
    remaining = together - sum(held.nbytes for held in on_host(evaluator._sharding(plan, 2), offload))
    assert remaining == pytest.approx(found["peak"] - on_the_host, rel=0.02)


def test_under_zero3_a_card_holds_its_part_of_the_states_and_deepspeeds_bucket() -> None:
    plan, evaluator = planned(4, {})
    held = evaluator.recording(plan, 0).allocations
    matrices = sum(-(-info.numel // 4) for info in evaluator.tree.parameters if info.is_matrix)
    vectors = sum(info.numel for info in evaluator.tree.parameters if not info.is_matrix)
    names = {info.name for info in evaluator.tree.parameters}  # the tables of positions are no parameters
    parameters = [each for each in held if each.category is Category.PARAMETER and each.parameter in names]
    assert sum(each.nbytes for each in parameters) == 2 * (matrices + vectors)
    active = [info for info in evaluator.tree.parameters if info.name.startswith("model.layers.0.")]
    masters = sum(each.nbytes for each in held if each.category is Category.MASTER)
    assert masters == 4 * sum(-(-info.numel // 4) for info in active)
    buckets = [each.nbytes for each in held if each.label == "bucket of gradients"]
    assert buckets == [2 * max(info.numel for info in active)]
    whole = {each.label: each.nbytes for each in held if (each.label or "").startswith("gathered ")}
    assert whole.keys() == {f"gathered {info.name}" for info in evaluator.tree.parameters if info.is_matrix}
    assert all(whole[f"gathered {info.name}"] == 2 * info.numel for info in active if info.is_matrix)


def test_what_is_offloaded_is_on_no_card() -> None:
    plan, evaluator = planned(4, {})
    kinds = {}
    for offload in ("none", "optimizer", "all"):
        target = plan.target.model_copy(update={"offload": offload})
        plan_there = plan.model_copy(update={"target": target.model_copy(update={"gpu": "a100-80gb"})})
        held = Evaluator(evaluator.tree).recording(plan_there, 0).allocations
        matrices = {info.name for info in evaluator.tree.parameters if info.is_matrix}
        kinds[offload] = {each.category for each in held if each.parameter in matrices}
    states = {Category.MASTER, Category.OPTIMIZER_STATE}
    assert states | {Category.PARAMETER} <= kinds["none"]
    assert kinds["none"] - kinds["optimizer"] == states
    assert kinds["none"] - kinds["all"] == states | {Category.PARAMETER}

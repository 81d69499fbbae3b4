"""The rehearsal against the CPU allocator's own reports of the same code on real tensors."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

from badam import phases
from badam.errors import InputError
from badam.plan import Plan
from badam.vocabulary import Category, Phase, Strategy
from badam_planner.recording.timeline import Timeline
from badam_planner.rehearsal.evaluator import Evaluator
from badam_planner.rehearsal.rehearse import rehearse
from tests.badam_planner.rehearsal.measuring import measure, products_take_known_scratch
from tests.badam_planner.rehearsal.plans import BERT, GPT2, LLAMA, QWEN3_MOE, plan_of

pytestmark = pytest.mark.usefixtures("nothing_left_over")


def measured_peak(plan: Plan, block: int) -> tuple[int, dict[Category, int]]:
    """Highest allocated bytes of one visit to ``block`` on real tensors, and the categories there."""
    gc.collect()
    measured = measure(plan, block)
    return measured.peak_bytes, measured.by_category


@pytest.mark.parametrize("strategy", ["layer", "attn-mlp", "matrix"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_predicted_peak_equals_the_allocators_to_the_byte(strategy: Strategy, checkpointing: bool, loss: Any) -> None:
    plan, tree = plan_of(LLAMA, 6, strategy=strategy, checkpointing=checkpointing, loss=loss)
    for block in {0, len(plan.partition.blocks) // 2}:
        predicted = Timeline(Evaluator(tree).recording(plan, block), tree.head_module).peak().nbytes
        assert predicted == measured_peak(plan, block)[0]
        gc.collect()


# GPT-2: each Python number that multiplies a tensor in its GELU is kept for backward in 8 bytes of host memory that no
# operator returns, three per layer.
@pytest.mark.parametrize(("config", "tolerance"), [(GPT2, 0.0005), (QWEN3_MOE, 0)], ids=["gpt2", "qwen3_moe"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_predicted_peak_equals_the_allocators_for_other_architectures(
    config: dict[str, Any], tolerance: float, checkpointing: bool
) -> None:
    plan, tree = plan_of(config, 3, checkpointing=checkpointing)
    predicted = Timeline(rehearse(plan, 0), tree.head_module).peak().nbytes
    assert predicted == pytest.approx(measured_peak(plan, 0)[0], rel=tolerance, abs=0)


@products_take_known_scratch
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_scratch_inside_cpu_kernels_is_missing_where_the_peak_is_in_a_layer(checkpointing: bool) -> None:
    plan, tree = plan_of({**BERT, "hidden_size": 96, "intermediate_size": 512}, 3, checkpointing=checkpointing)
    predicted = Timeline(rehearse(plan, 0), tree.head_module).peak().nbytes
    measured = measured_peak(plan, 0)[0]
    assert predicted <= measured
    assert predicted == pytest.approx(measured, rel=0.005)


def test_predicted_peak_equals_the_allocators_in_fp32() -> None:
    plan, tree = plan_of(LLAMA, 3, dtype="float32")
    assert Timeline(rehearse(plan, 1), tree.head_module).peak().nbytes == measured_peak(plan, 1)[0]


def test_accumulated_gradients_are_in_the_prediction() -> None:
    plan, tree = plan_of(LLAMA, 3, grad_accum=3)
    assert Timeline(rehearse(plan, 0), tree.head_module).peak().nbytes == measured_peak(plan, 0)[0]


def test_state_categories_at_the_peak_equal_the_measured_ones() -> None:
    plan, tree = plan_of(LLAMA, 3)
    timeline = Timeline(rehearse(plan, 0), tree.head_module)
    predicted = timeline.by_category(timeline.peak().tick)
    measured = measured_peak(plan, 0)[1]
    for category in (Category.PARAMETER, Category.MASTER, Category.OPTIMIZER_STATE):
        assert predicted[category] == measured[category] > 0


def test_nothing_is_saved_for_backward_below_the_active_block() -> None:
    plan, tree = plan_of(LLAMA, 6)
    timeline = Timeline(rehearse(plan, 4), tree.head_module)
    saved = [
        allocation.module
        for allocation, category in zip(timeline.recording.allocations, timeline.categories, strict=True)
        if category is Category.ACTIVATION and allocation.nbytes > 64
    ]
    layers = {tree.layer_of(module) for module in saved} - {""}
    assert layers <= {"model.layers.4", "model.layers.5"}


def test_every_gradient_and_state_carries_the_name_of_its_parameter() -> None:
    plan, _ = plan_of(LLAMA, 2)
    labels = {allocation.label for allocation in rehearse(plan, 1).allocations}
    name = "model.layers.1.mlp.up_proj.weight"
    assert {name, f"gradient of {name}", f"master of {name}", f"exp_avg of {name}", f"exp_avg_sq of {name}"} <= labels
    assert "gradient of model.layers.0.mlp.up_proj.weight" not in labels


def test_a_visit_begins_with_a_whole_step_before_masters_and_moments_exist() -> None:
    plan, _ = plan_of(LLAMA, 2)
    recording = rehearse(plan, 1)
    (first, turn), (second, _) = recording.steps
    states = [one for one in recording.allocations if one.category in (Category.MASTER, Category.OPTIMIZER_STATE)]
    gradients = [one for one in recording.allocations if one.category is Category.GRADIENT]
    assert turn == second
    assert states
    assert all(one.phase is Phase.STEP and first < one.born < turn < one.died for one in states)
    assert {one.born < turn for one in gradients} == {True, False}
    assert recording.switches


def test_a_rehearsal_leaves_no_trace() -> None:
    plan, _ = plan_of(LLAMA, 2, checkpointing=True)
    before = torch.get_rng_state()
    rehearse(plan, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert phases.current() is Phase.SETUP
    assert not isinstance(torch.empty(1), torch._subclasses.FakeTensor)


def test_a_model_that_looks_into_tensors_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaMLP.forward

    def looking(self: LlamaMLP, x: Tensor) -> Any:
        return forward(self, x) if x.sum() > 0 else x

    monkeypatch.setattr(LlamaMLP, "forward", looking)
    plan, _ = plan_of(LLAMA, 2)
    with pytest.raises(InputError, match=r"cannot be planned with transformers .*: aten\._local_scalar_dense"):
        rehearse(plan, 0)


def test_a_model_with_parts_compiled_by_torch_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    @torch.jit.script
    def scripted(x: Tensor) -> Tensor:
        return torch.where(x > 0, torch.tensor(1.0), x)

    monkeypatch.setattr(LlamaMLP, "forward", lambda _self, x: scripted(x))
    plan, _ = plan_of(LLAMA, 2)
    with pytest.raises(InputError, match=r"compiled by torch\.jit\.script"):
        rehearse(plan, 0)

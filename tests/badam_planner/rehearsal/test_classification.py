"""Encoders that are fine-tuned for classification, with their head in every block or in one of its own."""

from __future__ import annotations

from typing import Any

import pytest

from badam.errors import InputError
from badam.plan import Target
from badam.vocabulary import Category
from badam_planner.rehearsal.evaluator import Evaluator
from badam_planner.rehearsal.model_tree import inspect_model
from badam_planner.search.model_spec import describe_model, specify
from badam_planner.search.planner import Request, staged_plan
from badam_planner.search.settings import MemorySetting
from tests.badam_planner.rehearsal.plans import BERT, CPU, DEBERTA, GPT2, LLAMA, ROBERTA, plan_of
from tests.badam_planner.rehearsal.test_evaluator import everything_in

HEAD_ALWAYS: dict[str, Any] = {
    "include_embedding": True, "include_lm_head": True, "active_modules": ("classifier",),
}  # fmt: skip


@pytest.mark.parametrize("config", [ROBERTA, DEBERTA], ids=["roberta", "deberta"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_composed_blocks_with_an_active_head_equal_those_at_full_depth(
    config: dict[str, Any], checkpointing: bool
) -> None:
    plan, tree = plan_of(config, 9, checkpointing=checkpointing, **HEAD_ALWAYS)
    for block in (0, 5):
        composed = Evaluator(tree).recording(plan, block)
        full = Evaluator(tree, exact=True).recording(plan, block)
        assert everything_in(composed) == everything_in(full)


def test_an_active_head_has_masters_and_moments_besides_those_of_the_block() -> None:
    states = {}
    for active in ((), ("classifier",)):
        plan, tree = plan_of(ROBERTA, 3, include_embedding=True, active_modules=active)
        recording = Evaluator(tree).recording(plan, 1)
        states[active] = sum(one.nbytes for one in recording.allocations if one.category is Category.MASTER)
    head = sum(info.numel for info in tree.parameters if info.name.startswith("classifier."))
    assert states[("classifier",)] - states[()] == 4 * head
    assert Evaluator(tree).worst_block(plan).trained_entries == max(b.parameters for b in plan.partition.blocks) + head


def test_roberta_large_has_26_blocks() -> None:
    spec = describe_model("FacebookAI/roberta-large")
    request = Request(spec=spec, target=CPU, **HEAD_ALWAYS)
    plan = staged_plan(request, "layer", MemorySetting("none", "full"), inspect_model(spec, "sdpa"))
    names = [block.name for block in plan.partition.blocks]
    assert len(names) == 26
    assert (names[0], names[-1]) == ("embedding", "lm_head")
    assert plan.partition.active_modules == ("classifier",)


def test_a_configuration_without_architectures_means_what_transformers_has_for_it() -> None:
    facts = {**DEBERTA, "num_hidden_layers": 2}
    assert specify("deberta", "config", facts).task == "sequence-classification"
    llama = {**LLAMA, "num_hidden_layers": 2, "architectures": None}
    assert specify("llama", "config", llama).task == "causal-lm"
    assert specify("llama", "config", llama, task="sequence-classification").task == "sequence-classification"


def test_classes_are_counted_in_the_head() -> None:
    facts = {**ROBERTA, "num_hidden_layers": 2, "id2label": {"0": "yes", "1": "no"}}
    two, five = specify("r", "config", facts), specify("r", "config", facts, labels=5)
    assert five.parameters - two.parameters == 3 * (32 + 1)
    with pytest.raises(InputError, match="has no 5 classes"):
        specify("llama", "config", {**LLAMA, "num_hidden_layers": 2}, labels=5)


def test_attention_with_dropout_stays_fused_on_a_card() -> None:
    """On the CPU torch writes out batch x heads x length x length weights; no card does."""
    operations = {}
    for target in (CPU, Target(gpu="card", total_bytes=2**40, usable_bytes=2**40)):
        plan, tree = plan_of(ROBERTA, 2, target=target)
        operations[target.gpu] = {one.operation for one in Evaluator(tree).recording(plan, 0).allocations}
    assert any("softmax" in operation for operation in operations["cpu"])
    assert not any("safe_softmax" in operation for operation in operations["card"])


@pytest.mark.parametrize(
    ("config", "longest"), [(ROBERTA, 62), (BERT, 64), (GPT2, 64)], ids=["roberta", "bert", "gpt2"]
)
def test_a_length_beyond_the_models_positions_is_refused(config: dict[str, Any], longest: int) -> None:
    plan, tree = plan_of(config, 2, seq_len=longest)
    Evaluator(tree).recording(plan, 0)
    plan, tree = plan_of(config, 2, seq_len=longest + 1)
    with pytest.raises(InputError, match=f"has positions for {longest} tokens, the plan is for {longest + 1}"):
        Evaluator(tree).recording(plan, 0)


def test_a_module_beside_the_blocks_of_a_method_without_blocks_is_refused() -> None:
    with pytest.raises(InputError, match="badam-ratio has no blocks"):
        plan_of(ROBERTA, 2, method="badam-ratio", active_modules=("classifier",))

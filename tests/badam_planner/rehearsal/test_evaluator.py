"""Composition against rehearsal at full depth, event by event."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from badam.plan import MethodOptions, Target
from badam.training.methods import method_of
from badam.vocabulary import Phase
from badam_planner.composition import compose as composing
from badam_planner.composition import short_rehearsal as rehearsed
from badam_planner.composition.peaks import DepthPeaks
from badam_planner.composition.step_time import StepTimes
from badam_planner.recording.recording import NEVER, Recording
from badam_planner.recording.timeline import Timeline
from badam_planner.rehearsal import fake_ops as shapes
from badam_planner.rehearsal import rehearse, tracker
from badam_planner.rehearsal.evaluator import Evaluator
from tests.badam_planner.rehearsal.plans import BERT, CPU, GEMMA2, GPT2, LLAMA, QWEN3_MOE, plan_of


def everything_in(recording: Recording) -> list[tuple[Any, ...]]:
    """All that a recording says, in order of time; two recordings are equal if these are."""
    found: list[tuple[Any, ...]] = []
    for one in recording.allocations:
        found.append(
            (one.born, "born", one.nbytes, one.phase, one.module, one.operation, one.shape, one.dtype, one.category,
             one.label)
        )  # fmt: skip
        if one.died != NEVER:
            found.append((one.died, "died", one.born))
    found += [(tick, "phase", phase) for tick, phase in recording.phase_starts]
    found += [(mark.tick, "mark", mark.kind, mark.layer) for mark in recording.layer_marks]
    return sorted(found, key=lambda entry: entry[0])


GPU = Target(gpu="card", total_bytes=2**40, usable_bytes=2**40, context_bytes=2**28, workspace_bytes=2**23)
ARCHITECTURES = {"llama": LLAMA, "gpt2": GPT2, "gemma2": GEMMA2, "qwen3_moe": QWEN3_MOE, "bert": BERT}


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "architecture": draw(st.sampled_from(sorted(ARCHITECTURES))),
        "depth": draw(st.integers(2, 12)),
        "strategy": draw(st.sampled_from(["layer", "attn-mlp", "matrix"])),
        "checkpointing": draw(st.booleans()),
        "loss": draw(st.sampled_from(["full", "chunked"])),
        "batch_size": draw(st.integers(1, 3)),
        "seq_len": draw(st.integers(2, 40)),
        "grad_accum": draw(st.integers(1, 2)),
        "include_embedding": draw(st.booleans()),
        "block": draw(st.floats(0, 1, exclude_max=True)),
        "target": draw(st.sampled_from([CPU, GPU])),
    }


def compare(case: dict[str, Any]) -> None:
    case = dict(case)
    config = ARCHITECTURES[case.pop("architecture")]
    depth, where = case.pop("depth"), case.pop("block")
    if config is BERT:
        case["loss"] = "full"
    plan, tree = plan_of(config, depth, **case)
    block = int(where * len(plan.partition.blocks))
    evaluator = Evaluator(tree)
    composed = evaluator.recording(plan, block)
    full = Evaluator(tree, exact=True).recording(plan, block)
    assert everything_in(composed) == everything_in(full)
    assert (composed.flops, composed.traffic) == (full.flops, full.traffic)
    assert evaluator.peaks(plan, block) == DepthPeaks(full, (), plan.target).peaks(())
    assert evaluator.flops(plan, block) == full.flops
    work_by_phase = StepTimes(full, (), None, plan.training.dtype).work_by_phase(())
    assert evaluator.work_by_phase(plan, block) == work_by_phase


RELAXED = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
DEEP = {
    "architecture": "llama", "depth": 12, "strategy": "layer", "checkpointing": True, "loss": "full", "batch_size": 1,
    "seq_len": 8, "grad_accum": 1, "include_embedding": False, "block": 0.0, "target": GPU,
}  # fmt: skip


@settings(max_examples=15, **RELAXED)
@given(cases())
@example(DEEP)
@example({**DEEP, "block": 0.5})
@example({**DEEP, "architecture": "gemma2", "block": 0.5, "checkpointing": False})
@example({**DEEP, "architecture": "gpt2", "strategy": "matrix", "grad_accum": 2})
def test_a_composed_recording_equals_the_one_at_full_depth(case: dict[str, Any]) -> None:
    compare(case)


@pytest.mark.slow
@settings(max_examples=300, **RELAXED)
@given(cases())
def test_three_hundred_composed_recordings_equal_those_at_full_depth(case: dict[str, Any]) -> None:
    compare(case)


METHODS: dict[str, str] = {
    "adam": "full", "badam-ratio": "ratio", "lora": "full", "qlora": "full", "lomo": "full", "adalomo": "full",
    "galore": "full", "lisa": "layer", "hift": "layer", "mezo": "full",
}  # fmt: skip
"""How each method but badam cuts a model."""
OPTIONS = MethodOptions(rank=4, update_ratio=0.3, sampled_layers=2)


@st.composite
def cases_of_other_methods(draw: st.DrawFn) -> dict[str, Any]:
    method = draw(st.sampled_from(sorted(METHODS)))
    return of_method(method, {**draw(cases()), "include_embedding": False})


def of_method(method: Any, case: dict[str, Any]) -> dict[str, Any]:
    """The case, as far as the method can do it and the other tests' settings can be had."""
    case = {**case, "method": method, "strategy": METHODS[method], "options": OPTIONS}
    if not method_of(method).accumulates:
        case["grad_accum"] = 1
    if method == "qlora" and case["architecture"] == "bert":
        case["architecture"] = "llama"  # qlora trains language models only
    return case


@pytest.fixture
def libraries() -> None:
    for module in ("peft", "bitsandbytes", "galore_torch", "lomo_optim", "pytorch_optimizer"):
        pytest.importorskip(module)


@pytest.mark.parametrize("accumulated", [False, True], ids=["one batch", "two batches"])
@pytest.mark.parametrize("method", METHODS)
def test_a_composed_recording_of_every_method_equals_the_one_at_full_depth(
    method: str, accumulated: bool, libraries: None
) -> None:
    where = {"block": 0.5, "depth": 11, "checkpointing": accumulated, "target": GPU if accumulated else CPU}
    architecture = "gpt2" if accumulated else "llama"
    compare(of_method(method, {**DEEP, **where, "architecture": architecture, "grad_accum": 1 + accumulated}))


@pytest.mark.slow
@settings(max_examples=200, **RELAXED)
@given(cases_of_other_methods())
def test_two_hundred_composed_recordings_of_other_methods_equal_those_at_full_depth(
    libraries: None, case: dict[str, Any]
) -> None:
    compare(case)


@pytest.mark.parametrize("method", METHODS)
def test_four_of_many_layers_answer_for_every_method(
    method: str, monkeypatch: pytest.MonkeyPatch, libraries: None
) -> None:
    case: dict[str, Any] = {"strategy": METHODS[method], "method": method, "options": OPTIONS}
    plan, tree = plan_of(LLAMA, 16, target=GPU, **case)
    asked = counted(monkeypatch)
    found = Evaluator(tree).worst_block(plan)
    assert min(asked) >= 16 - 2 * composing.KEPT_CYCLES - 2
    assert found == Evaluator(tree, exact=True).worst_block(plan)


def test_adapters_on_single_layers_are_rehearsed_at_full_depth() -> None:
    pytest.importorskip("peft")
    options = MethodOptions(target_modules=("layers.5.self_attn.q_proj",))
    plan, tree = plan_of(LLAMA, 9, strategy="full", method="lora", options=options)
    assert Evaluator(tree).worst_block(plan) == Evaluator(tree, exact=True).worst_block(plan)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers left out of each rehearsal that is made from now on."""
    asked: list[int] = []
    original = rehearse.rehearse

    def counting(*args: Any, **kwargs: Any) -> Recording:
        asked.append(len(kwargs.get("without", ())))
        return original(*args, **kwargs)

    monkeypatch.setattr(rehearse, "rehearse", counting)
    return asked


def test_five_short_rehearsals_answer_for_every_block_of_a_deep_model(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, tree = plan_of(LLAMA, 16, checkpointing=True)
    asked = counted(monkeypatch)
    evaluator = Evaluator(tree)
    evaluator.every_block(plan, evaluator.worst_block(plan))
    assert len(asked) == 5
    assert min(asked) >= 16 - 2 * composing.KEPT_CYCLES - 1


def test_a_rehearsal_with_four_layers_on_both_sides_also_answers_for_two_and_three() -> None:
    plan, tree = plan_of(LLAMA, 10)
    evaluator, exact = Evaluator(tree), Evaluator(tree, exact=True)
    evaluator.recording(plan, 5)
    for block in (2, 3, 6, 7):
        composed, full = evaluator.recording(plan, block), exact.recording(plan, block)
        assert everything_in(composed) == everything_in(full)
        assert (composed.flops, composed.traffic) == (full.flops, full.traffic)
    assert len(evaluator._rehearsed) == 1


def test_layers_that_differ_are_rehearsed_at_full_depth() -> None:
    plan, tree = plan_of(GEMMA2, 9)
    assert len(set(tree.layer_kinds.values())) == 2
    full = Evaluator(tree, exact=True).recording(plan, 0)
    assert everything_in(Evaluator(tree).recording(plan, 0)) == everything_in(full)


@pytest.mark.parametrize("config", [LLAMA, GPT2, QWEN3_MOE, BERT], ids=lambda config: config["model_type"])
def test_answers_from_memory_change_nothing(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second rehearsal is answered from what the first one saw; a third, with another size, must not be."""
    plan, tree = plan_of(config, 3, checkpointing=True)
    other, _ = plan_of(config, 3, checkpointing=True, batch_size=3)
    remembered = [rehearse.rehearse(each, 0, layers=tree.layers) for each in (plan, plan, other)]
    monkeypatch.setattr(tracker, "answer", lambda _mode, *rest: shapes.answer(None, *rest))
    asked = [rehearse.rehearse(each, 0, layers=tree.layers) for each in (plan, plan, other)]
    for one, two in zip(remembered, asked, strict=True):
        assert everything_in(one) == everything_in(two)
        assert (one.flops, one.traffic) == (two.flops, two.traffic)


def test_layers_that_are_not_rehearsed_are_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    built: list[None] = []
    build = LlamaMLP.__init__

    def counting(*args: Any, **kwargs: Any) -> None:
        built.append(None)
        build(*args, **kwargs)

    plan, tree = plan_of(LLAMA, 12)
    monkeypatch.setattr(LlamaMLP, "__init__", counting)
    Evaluator(tree).recording(plan, 0)
    assert len(built) == 1 + composing.KEPT_CYCLES


def test_a_run_that_turns_out_not_to_repeat_falls_back_to_full_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Recording:
        raise composing.NotPeriodic("for the test")

    plan, tree = plan_of(LLAMA, 8)
    full = Evaluator(tree, exact=True).recording(plan, 0)
    monkeypatch.setattr(rehearsed, "compose", refuse)
    assert everything_in(Evaluator(tree).recording(plan, 0)) == everything_in(full)


def test_the_worst_block_is_the_maximum_over_all_blocks() -> None:
    for strategy in ("layer", "matrix"):
        plan, tree = plan_of(LLAMA, 3, strategy=strategy, checkpointing=True, include_embedding=True)
        evaluator = Evaluator(tree)
        known = evaluator.worst_block(plan)
        every = evaluator.every_block(plan, known)
        assert known.worst.peak_allocated_bytes == max(block.peak_allocated_bytes for block in every.blocks)
        exact = Evaluator(tree, exact=True)
        for index, block in enumerate(every.blocks):
            timeline = Timeline(exact.recording(plan, index), tree.head_module)
            assert block.by_phase == {phase: at.nbytes for phase, at in timeline.peak_by_phase().items()}
            assert block.peak_phase == timeline.peak().phase


def test_giving_up_needs_no_more_than_one_block_too_large() -> None:
    plan, tree = plan_of(LLAMA, 4)
    evaluator = Evaluator(tree)
    peak = evaluator.worst_block(plan).worst.peak_device_bytes
    assert evaluator.worst_block(plan, give_up_above=peak - 1) is None
    assert evaluator.worst_block(plan, give_up_above=peak) is not None


def test_relative_backward_equals_what_every_blocks_own_rehearsal_counts() -> None:
    plan, tree = plan_of(LLAMA, 6, checkpointing=True)
    evaluator = Evaluator(tree)
    relative = evaluator.worst_block(plan).backward_relative
    counts = [
        sum(
            count
            for (phase, _), count in evaluator.recording(plan, block).flops.items()
            if phase in (Phase.BACKWARD, Phase.RECOMPUTE)
        )
        for block in range(6)
    ]
    for one, count in zip(relative, counts, strict=True):
        assert one / relative[0] == pytest.approx(count / counts[0])
    assert relative == tuple(sorted(relative, reverse=True))
    assert 0 < relative[-1] < relative[0] < 1


def test_a_card_has_the_context_and_workspace_on_top() -> None:
    plan, tree = plan_of(LLAMA, 4, target=GPU)
    on_gpu = Evaluator(tree).worst_block(plan).worst
    assert on_gpu.peak_device_bytes == on_gpu.peak_reserved_bytes + 2**28
    assert on_gpu.peak_reserved_bytes >= on_gpu.peak_allocated_bytes > 2**23


def test_work_is_that_of_one_step() -> None:
    """The products of a Llama's forward by hand; two micro-batches do twice the work, but one update."""
    plan, tree = plan_of(LLAMA, 5, batch_size=2, seq_len=8)
    work = Evaluator(tree).work_by_phase(plan, 0)
    tokens, hidden, kv, inter, vocabulary = 16, 32, 16, 48, 768
    per_token = 5 * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inter) + hidden * vocabulary
    attention = 5 * 2 * 2 * 2 * 4 * 8 * 8 * 8  # layers, products, operations, sequences, heads, length squared, head
    angles = 2 * 8 * 4  # of the rotary embedding, length and half a head: a product in transformers before 5.23
    counted = work[Phase.FORWARD].flops + work[Phase.LOSS].flops - 2 * tokens * per_token - attention
    assert counted in (0, angles)
    twice = Evaluator(tree).work_by_phase(plan_of(LLAMA, 5, batch_size=2, seq_len=8, grad_accum=2)[0], 0)
    assert twice[Phase.FORWARD].flops == 2 * work[Phase.FORWARD].flops
    assert twice[Phase.STEP].other_bytes == work[Phase.STEP].other_bytes
    trained = plan.partition.blocks[0].parameters
    assert work[Phase.STEP].other_bytes > 28 * trained  # master and moments read and written, gradient read
    assert work[Phase.STEP].other_bytes < 2 * 28 * trained  # clipping comes on top, but not a second update

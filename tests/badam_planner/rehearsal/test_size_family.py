"""Recordings that follow from those at other sizes, against rehearsals of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from badam.plan import Plan, Target
from badam.vocabulary import Phase
from badam_planner.composition.sizes import NoFamily, SizeFamily, SizeRange, ranges_of
from badam_planner.recording.recording import Allocation, Recording
from badam_planner.rehearsal import evaluator as evaluate
from badam_planner.rehearsal.evaluator import Evaluator
from tests.badam_planner.rehearsal.plans import CPU, GPT2, LLAMA, QWEN3_MOE, plan_of

GPU = Target(gpu="card", total_bytes=2**40, usable_bytes=2**40, context_bytes=2**28, workspace_bytes=2**23)
BATCHES, LENGTHS = (1, 2, 3, 5, 8), (128, 256, 384, 512, 640, 768)


def at_size(plan: Plan, batch_size: int, seq_len: int) -> Plan:
    training = plan.training.model_copy(update={"batch_size": batch_size, "seq_len": seq_len})
    return plan.model_copy(update={"training": training})


def sized(recording: Recording) -> list[tuple[Any, ...]]:
    """What a recording says, but for shapes and traffic."""
    return [
        (one.born, one.died, one.nbytes, one.phase, one.module, one.operation, one.category, one.label)
        for one in recording.allocations
    ]


@pytest.mark.parametrize("loss", ["full", "chunked"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize(
    ("config", "strategy"),
    [(LLAMA, "attn-mlp"), ({**GPT2, "n_positions": 768}, "layer"), (QWEN3_MOE, "layer")],
    ids=["llama", "gpt2", "moe"],
)
def test_recordings_of_a_family_are_the_rehearsals(
    config: dict[str, Any], strategy: Any, checkpointing: bool, loss: Any
) -> None:
    plan, tree = plan_of(config, 5, strategy=strategy, checkpointing=checkpointing, loss=loss)
    one_by_one, together = Evaluator(tree), Evaluator(tree)
    together.expect_sizes(BATCHES, LENGTHS)
    for size in ((1, 384), (3, 128), (5, 512), (8, 768)):
        each = at_size(plan, *size)
        expected, found = one_by_one.recording(each, 1), together.recording(each, 1)
        assert sized(found) == sized(expected)
        assert found.flops == expected.flops
        assert together.peaks(each, 1) == one_by_one.peaks(each, 1)


@pytest.mark.parametrize("target", [CPU, GPU], ids=["cpu", "card"])
def test_forecasts_at_the_sizes_of_a_family_are_those_of_rehearsals(target: Target) -> None:
    plan, tree = plan_of(LLAMA, 7, strategy="attn-mlp", checkpointing=True, target=target)
    one_by_one, together = Evaluator(tree), Evaluator(tree)
    together.expect_sizes(BATCHES, LENGTHS)
    for size in ((1, 512), (3, 256), (8, 640)):
        each = at_size(plan, *size)
        expected, found = one_by_one.worst_block(each), together.worst_block(each)
        assert replace(found.worst, largest=()) == replace(expected.worst, largest=())  # names want shapes
        assert replace(found, worst=expected.worst) == expected
    patterns = {id(rehearsed) for rehearsed, _ in together._rehearsed.values()}
    assert len(patterns) < len(together._rehearsed)


def test_a_range_of_sizes_takes_a_few_rehearsals(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, tree = plan_of(LLAMA, 5)
    made: list[None] = []
    record = evaluate.Evaluator._record

    def counting(*args: Any) -> Recording:
        made.append(None)
        return record(*args)

    monkeypatch.setattr(evaluate.Evaluator, "_record", counting)
    evaluator = Evaluator(tree)
    evaluator.expect_sizes(BATCHES, LENGTHS)
    for batch in BATCHES:
        for length in LENGTHS:
            evaluator.peaks(at_size(plan, batch, length), 0)
    assert len(made) == 4 + 4  # of a batch of one, and of more


def test_sizes_off_the_grid_are_rehearsed() -> None:
    plan, tree = plan_of(LLAMA, 4)
    evaluator = Evaluator(tree)
    evaluator.expect_sizes(BATCHES, LENGTHS)
    odd = at_size(plan, 3, 200)
    assert evaluator.recording(odd, 0).traffic
    assert evaluator.peaks(odd, 0) == Evaluator(tree).peaks(odd, 0)


SIZES = SizeRange(2, 6, 128, (256, 384), 512)


def recordings(count: Any, sizes: SizeRange = SIZES) -> dict[tuple[int, int], Recording]:
    """Recordings with one allocation of ``count(batch, length)`` bytes."""
    one = Allocation(0, 1, 2, Phase.FORWARD, "layer", "aten.mm", (), "bfloat16")
    return {
        (batch, length): Recording(
            allocations=[replace(one, nbytes=count(batch, length))], flops={(Phase.FORWARD, "layer"): 7 * batch}, end=3
        )
        for batch, length in sizes.probes()
    }


@given(st.tuples(*[st.integers(0, 9)] * 3), st.integers(0, 2), st.integers(2, 6), st.integers(1, 4))
def test_what_grows_with_powers_is_found_at_every_size(
    factors: tuple[int, int, int], power: int, batch: int, step: int
) -> None:
    def count(batch: int, length: int) -> int:
        return (factors[0] * length**2 + factors[1] * length + factors[2]) * batch**power

    found = SizeFamily(SIZES, recordings(count)).at((batch, 128 * step))
    assert found.allocations[0].nbytes == count(batch, 128 * step)
    assert found.flops == {(Phase.FORWARD, "layer"): 7 * batch}


@pytest.mark.parametrize(
    "count",
    [
        lambda batch, length: batch * length + batch + length,
        lambda batch, length: length**3,
        lambda batch, length: batch * (length + 600 * (length == 256)),
        lambda batch, length: batch * length + (batch == 6) * (length == 512),
    ],
    ids=["mixed", "cubic", "the middle is off", "a corner is off"],
)
def test_what_grows_in_another_way_is_no_family(count: Any) -> None:
    with pytest.raises(NoFamily):
        SizeFamily(SIZES, recordings(count))


def test_other_events_at_another_size_are_no_family() -> None:
    several = recordings(lambda batch, length: batch * length)
    several[6, 512].allocations[0].died = 5
    with pytest.raises(NoFamily, match="other events"):
        SizeFamily(SIZES, several)


def test_a_batch_of_one_is_a_range_of_its_own() -> None:
    alone, others = ranges_of(BATCHES, LENGTHS)
    assert alone.probes() == ((1, 128), (1, 384), (1, 512), (1, 768))
    assert others.probes() == ((2, 128), (2, 384), (2, 512), (8, 768))
    assert not alone.has((2, 128))
    assert others.has((2, 128))
    assert not others.has((1, 128))
    assert not others.has((2, 130))


def test_few_lengths_are_not_worth_a_family() -> None:
    assert ranges_of(BATCHES, (128, 256, 300, 512, 640)) == ()

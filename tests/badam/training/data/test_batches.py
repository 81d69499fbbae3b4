"""Batches never exceed the plan, and padding changes nothing that is learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from badam.errors import DataError
from badam.training.build import build_model
from badam.training.data.batches import EpochSampler, PlanCollator, enforce_length
from badam.training.data.dataset import to_dataset
from badam.training.losses import IGNORE_INDEX, forward_loss
from badam.vocabulary import OnLong
from tests.badam.training.tiny import tiny_plan

LIMIT = 8


def example(length: int, *, prompt: int = 0) -> dict[str, Any]:
    tokens = list(range(3, 3 + length))
    return {"input_ids": tokens, "labels": [IGNORE_INDEX] * prompt + tokens[prompt:]}


def dataset(*examples: dict[str, Any]) -> Any:
    made = to_dataset(examples)
    assert made is not None
    return made


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.booleans())
def test_a_batch_has_the_plans_length_at_most(lengths: list[int], full_length: bool) -> None:
    collator = PlanCollator(LIMIT, pad_token_id=0)
    collator.full_length = full_length
    batch = collator([example(length) for length in lengths])
    wanted = LIMIT if full_length else min(LIMIT, max(lengths))
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].shape == batch["labels"].shape == (len(lengths), wanted)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    for row, length in enumerate(lengths):
        kept = min(length, LIMIT)
        assert batch["input_ids"][row, :kept].tolist() == example(length)["input_ids"][:kept]
        assert batch["labels"][row, kept:].eq(IGNORE_INDEX).all()
    assert collator.tokens == sum(min(length, LIMIT) for length in lengths)


def test_padding_changes_neither_loss_nor_gradient() -> None:
    plan = tiny_plan(training={"dtype": "float32"})
    examples = [example(5), example(3, prompt=1)]
    found = []
    for full_length in (False, True):
        torch.manual_seed(0)
        model = build_model(plan.model, plan.training)
        collator = PlanCollator(LIMIT, pad_token_id=0)
        collator.full_length = full_length
        loss = forward_loss(model, collator(examples), "full")
        loss.backward()
        found.append((loss.detach(), model.model.layers[0].mlp.up_proj.weight.grad))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize(("on_long", "kept"), [("truncate", 3), ("drop", 2)])
def test_longer_examples_are_cut_or_left_out_as_asked(on_long: OnLong, kept: int) -> None:
    left, report = enforce_length(dataset(example(4), example(LIMIT), example(20)), LIMIT, on_long)
    assert len(left) == kept
    assert (report.examples, report.longer, report.longest, report.dropped) == (3, 1, 20, 3 - kept)


def test_a_prompt_that_fills_the_length_leaves_nothing_to_learn() -> None:
    left, report = enforce_length(dataset(example(4), example(20, prompt=LIMIT)), LIMIT, "truncate")
    assert len(left) == 1
    assert report.dropped == 1


def test_longer_examples_can_be_refused_with_their_number() -> None:
    with pytest.raises(DataError, match=r"1 of 2 examples .* longest has 20") as caught:
        enforce_length(dataset(example(4), example(20)), LIMIT, "refuse")
    assert "--seq-len 20" in str(caught.value)


def test_data_of_which_nothing_can_be_learned_is_refused() -> None:
    with pytest.raises(DataError, match="No example can be trained on"):
        enforce_length(dataset(example(20, prompt=LIMIT)), LIMIT, "truncate")


@given(st.integers(0, 50), st.integers(0, 3), st.integers(0, 5))
def test_an_epochs_order_is_a_permutation_that_depends_on_seed_and_epoch_only(size: int, seed: int, epoch: int) -> None:
    first, second = EpochSampler(range(size), seed), EpochSampler(range(size), seed)
    list(first)  # an epoch before does not matter
    first.epoch = second.epoch = epoch
    assert list(first) == list(second)
    assert sorted(first) == list(range(size))


def test_epochs_and_seeds_differ() -> None:
    orders = set()
    for seed in range(3):
        for epoch in range(3):
            sampler = EpochSampler(range(50), seed)
            sampler.epoch = epoch
            orders.add(tuple(sampler))
    assert len(orders) == 9

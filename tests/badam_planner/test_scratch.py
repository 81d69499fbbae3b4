"""Scratch of a card's kernels counts on a card and nowhere else."""

from __future__ import annotations

from badam_planner.probe.rehearse import rehearse
from badam_planner.scratch import flash_backward_bytes
from badam_planner.timeline import Timeline
from tests.badam_planner.probe.plans import LLAMA, plan_of


def test_flash_attention_accumulates_the_queries_gradient_in_fp32_over_rounded_lengths() -> None:
    row_sums, accumulator = flash_backward_bytes((2, 4, 100, 80), (2, 4, 100, 80), 2)
    assert row_sums == 2 * 4 * 128 * 4
    assert accumulator == 2 * 4 * 128 * 96 * 4
    assert flash_backward_bytes((1, 1, 128, 160), (1, 1, 128, 160), 2)[1] == 128 * 192 * 4


def test_shared_key_heads_cost_gradients_for_every_query_head() -> None:
    expanded = flash_backward_bytes((2, 8, 128, 64), (2, 2, 128, 64), 2)[2:]
    assert expanded == (2 * 8 * 128 * 64 * 2,) * 2


def test_scratch_is_recorded_in_backward_and_counted_on_cards_only() -> None:
    plan, tree = plan_of(LLAMA, 2)
    recording = rehearse(plan, 0)
    scratch = [allocation for allocation in recording.allocations if allocation.card_only]
    assert {allocation.module for allocation in scratch} == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    assert all(allocation.died > allocation.born for allocation in scratch)
    index = recording.allocations.index(max(scratch, key=lambda allocation: allocation.nbytes))
    assert Timeline(recording, tree.head_module).sizes[index] == 0
    assert Timeline(recording, tree.head_module, on_card=True).sizes[index] == recording.allocations[index].nbytes

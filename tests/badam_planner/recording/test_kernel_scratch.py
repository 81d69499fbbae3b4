"""Scratch of kernels counts where they run: on a card, or on a CPU."""

from __future__ import annotations

import pytest
import torch

from badam.plan import Target
from badam.profiling.memory.cpu_allocator_log import AllocatorLog
from badam_planner.recording.kernel_scratch import BY_INDEX, by_index_bytes, flash_backward_bytes
from badam_planner.recording.timeline import Timeline
from badam_planner.rehearsal.rehearse import rehearse
from tests.badam_planner.rehearsal.plans import DEBERTA, LLAMA, plan_of


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
    scratch = [allocation for allocation in recording.allocations if allocation.gpu_only]
    assert {allocation.module for allocation in scratch} == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    assert all(allocation.died > allocation.born for allocation in scratch)
    index = recording.allocations.index(max(scratch, key=lambda allocation: allocation.nbytes))
    assert Timeline(recording, tree.head_module).sizes[index] == 0
    assert Timeline(recording, tree.head_module, on_gpu=True).sizes[index] == recording.allocations[index].nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("operator", ["gather", "scatter_add"])
def test_a_cpu_copies_what_it_gathers_or_scatters_in_two_bytes(operator: str, dtype: torch.dtype) -> None:
    source, index = torch.ones(3, 5, 7, dtype=dtype), torch.zeros(3, 5, 11, dtype=torch.int64)
    values = torch.ones(3, 5, 11, dtype=dtype)
    log = AllocatorLog()
    log.start()
    made = source.gather(-1, index) if operator == "gather" else source.scatter_add(-1, index, values)
    taken = [nbytes for _, nbytes in log.stop() if nbytes > 0]
    own = made.numel() * dtype.itemsize
    assert taken == [own, *by_index_bytes(made.shape, dtype.itemsize)]


def test_copies_for_an_index_are_recorded_on_a_cpu_only() -> None:
    for gpu, expected in (("cpu", True), ("card", False)):
        plan, _ = plan_of(DEBERTA, 1, target=Target(gpu=gpu, total_bytes=2**40, usable_bytes=2**40))
        operations = [allocation.label for allocation in rehearse(plan, 0).allocations if allocation.label]
        assert any(label.startswith("fp32 copy") for label in operations) is expected
    assert "aten.gather.default" in BY_INDEX

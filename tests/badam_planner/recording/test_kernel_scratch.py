"""Scratch of kernels counts where they run: on a card, or on a CPU."""

from __future__ import annotations

import pytest
import torch

from badam.plan import Target
from badam.profiling.memory.cpu_allocator_log import AllocatorLog
from badam.vocabulary import Category, Phase
from badam_planner.recording.kernel_scratch import (
    BY_INDEX,
    ColumnSum,
    EmbeddingSums,
    Occupancy,
    by_index_bytes,
    column_sum_shape,
    flash_backward_bytes,
)
from badam_planner.recording.recording import NEVER
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


A100 = Occupancy(108, 2048)


@pytest.mark.parametrize(
    ("rows", "columns", "nbytes"),
    [(1456, 4096, 48234496), (5824, 4096, 113246208), (40000, 8192, 167772160), (93184, 128, 95420416),
     (131072, 128, 113246208), (5824, 11008, 118358016), (1000, 4096, 0), (5824, 16, 0), (0, 4096, 0)],
)  # fmt: skip
def test_a_column_sum_takes_what_torch_asked_the_allocator_for_on_an_a100(rows: int, columns: int, nbytes: int) -> None:
    """Requests of ``Tensor.sum`` in torch 2.14's CUDA build."""
    assert ColumnSum(columns, A100).nbytes(rows) == nbytes


def test_a_column_sum_takes_no_less_on_a_gpu_with_more_multiprocessors() -> None:
    fewer, more = ColumnSum(4096, Occupancy(82, 1536)), ColumnSum(4096, Occupancy(132, 2048))
    assert all(fewer.nbytes(rows) <= more.nbytes(rows) for rows in range(256, 20000, 64))
    assert fewer.nbytes(5824) < more.nbytes(5824)


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "width", "nbytes"),
    [(3072, 32000, 4096, 0), (3073, 32000, 4096, 55377920), (5824, 128256, 4096, 104955904),
     (16384, 1000, 2048, 21610496)],
)  # fmt: skip
def test_an_embeddings_backward_takes_what_torch_asked_the_allocator_for(
    tokens: int, vocabulary: int, width: int, nbytes: int
) -> None:
    assert EmbeddingSums(vocabulary, width).nbytes(tokens) == nbytes


def test_only_sums_over_leading_dimensions_are_column_sums() -> None:
    assert column_sum_shape((8, 728, 4096), (0, 1)) == (5824, 4096)
    assert column_sum_shape((8, 728, 16, 128), (0, 1, -2)) == (8 * 728 * 16, 128)
    assert column_sum_shape((1, 728, 4096), (1,)) == (728, 4096)
    assert column_sum_shape((8, 728, 4096), (2,)) is None
    assert column_sum_shape((8, 728, 4096), (1,)) is None
    assert column_sum_shape((5824, 4096), (0, 1)) is None
    assert column_sum_shape((), ()) is None


def test_a_norms_gradient_takes_partial_sums_on_a_gpu_and_not_on_a_cpu() -> None:
    plan, _ = plan_of(LLAMA, 2, seq_len=1024, batch_size=16)
    gpu = Target(
        gpu="rtx3090", total_bytes=2**34, usable_bytes=2**34, multiprocessors=82, threads_per_multiprocessor=1536
    )
    found = [one for one in rehearse(plan.model_copy(update={"target": gpu}), 0).allocations if one.rule is not None]
    assert found
    assert all(one.gpu_only and one.nbytes == one.rule.nbytes(16384) for one in found if one.rule is not None)
    assert max(one.nbytes for one in found) > 0
    assert not [one for one in rehearse(plan, 0).allocations if one.rule is not None]


def test_each_thread_takes_one_workspace_after_its_first_product() -> None:
    plan, _ = plan_of(LLAMA, 2)
    gpu = Target(gpu="rtx3090", total_bytes=2**34, usable_bytes=2**34, workspace_bytes=8519680)
    recording = rehearse(plan.model_copy(update={"target": gpu}), 0)
    places = [index for index, one in enumerate(recording.allocations) if one.category is Category.WORKSPACE]
    first, second = (recording.allocations[index] for index in places)
    assert (first.phase, second.phase) == (Phase.FORWARD, Phase.BACKWARD)
    assert first.nbytes == second.nbytes == 8519680
    assert first.died == second.died == NEVER
    assert all(recording.allocations[index - 1].operation.startswith(("aten.mm", "aten.addmm")) for index in places)
    begin, end = recording.steps[0]
    assert begin < first.born < second.born < end

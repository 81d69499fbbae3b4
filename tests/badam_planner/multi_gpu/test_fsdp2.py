"""One rank's recording under FSDP2, from a step that is written by hand."""

from __future__ import annotations

import pytest

from badam.vocabulary import Category, Phase
from badam_planner.multi_gpu.fsdp2 import shard, units_of
from badam_planner.multi_gpu.slots import SPREAD
from badam_planner.recording.recording import Allocation, TensorRole
from tests.badam_planner.multi_gpu.models import (
    ACTIVE,
    LAYERS,
    MATRIX,
    PARAMETERS,
    WIDTH,
    WORDS,
    one_gpu_step,
    sharding,
)

LAYER = MATRIX + WIDTH


def of_role(allocations: list[Allocation], role: TensorRole) -> list[Allocation]:
    return [one for one in allocations if one.role is role]


def test_units_are_the_embedding_every_layer_and_the_rest() -> None:
    units = units_of(PARAMETERS, layers=LAYERS, head_module="head")
    assert [unit.path for unit in units] == ["model.embed", *LAYERS, ""]
    assert [info.name for info in units[-1].parameters] == ["head.weight"]


def test_an_embedding_that_the_head_shares_belongs_to_the_root() -> None:
    tied = [info for info in PARAMETERS if info.name != "head.weight"]
    units = units_of(tied, layers=LAYERS, head_module="head")
    assert [unit.path for unit in units] == [*LAYERS, ""]
    assert [info.name for info in units[-1].parameters] == ["model.embed.weight"]


@pytest.mark.parametrize(("shards", "rows"), [(2, 2), (4, 1), (3, 2), (8, 1)])
def test_a_gpu_keeps_its_rows_of_parameters_and_states_padded_where_they_do_not_divide(shards: int, rows: int) -> None:
    recording = shard(one_gpu_step(), sharding(shards))
    kept = [one for one in recording.allocations if one.parameter == ACTIVE and one.born < 10 * SPREAD]
    assert {one.role: (one.shape, one.nbytes) for one in kept} == {
        TensorRole.PARAMETER: ((rows, WIDTH), 2 * rows * WIDTH),
        TensorRole.MASTER: ((rows, WIDTH), 4 * rows * WIDTH),
        TensorRole.STATE: ((rows, WIDTH), 4 * rows * WIDTH),
    }


def test_every_unit_is_gathered_in_forward_and_those_that_backward_reaches_once_more() -> None:
    gathered = of_role(shard(one_gpu_step(), sharding(2)).allocations, TensorRole.GATHERED)
    assert [(one.phase, one.parameter, one.nbytes) for one in gathered] == [
        (Phase.FORWARD, "", 2 * WORDS * WIDTH),
        (Phase.FORWARD, "model.embed", 2 * WORDS * WIDTH),
        (Phase.FORWARD, LAYERS[0], 2 * LAYER),
        (Phase.FORWARD, LAYERS[1], 2 * LAYER),
        (Phase.BACKWARD, LAYERS[1], 2 * LAYER),
        (Phase.BACKWARD, LAYERS[0], 2 * LAYER),
    ]
    assert {one.operation for one in gathered} == {"fsdp2"}


def test_a_gathered_unit_is_there_while_what_is_computed_in_it_is_made() -> None:
    recording = shard(one_gpu_step(), sharding(2))
    gathered = of_role(recording.allocations, TensorRole.GATHERED)
    for one in recording.allocations:
        layer = next((layer for layer in LAYERS if one.module.startswith(f"{layer}.")), "")
        if layer and one.role is None:
            assert [each for each in gathered if each.parameter == layer and each.born < one.born < each.died]


@pytest.mark.parametrize(("dtype", "half"), [("bfloat16", [2 * MATRIX // 2]), ("float32", [])])
def test_the_reduction_leaves_an_fp32_part_that_stays_until_the_step_took_it(dtype: str, half: list[int]) -> None:
    recording = shard(one_gpu_step(), sharding(2, dtype=dtype))  # type: ignore[arg-type]
    step = next(tick for tick, phase in recording.phase_starts if phase is Phase.STEP)
    (kept,) = [one for one in of_role(recording.allocations, TensorRole.GRADIENT) if one.parameter == LAYERS[0]]
    assert (kept.nbytes, kept.category) == (4 * MATRIX // 2, Category.GRADIENT)
    assert kept.born < step < kept.died
    (sent,) = of_role(recording.allocations, TensorRole.REDUCTION_INPUT)
    assert (sent.nbytes, sent.parameter) == (4 * MATRIX, LAYERS[0])
    assert sent.died < step
    assert [one.nbytes for one in of_role(recording.allocations, TensorRole.REDUCED_HALF)] == half


def test_copies_average_once_a_step_what_micro_batches_summed() -> None:
    recording = shard(one_gpu_step(micro_batches=3), sharding(2, replicas=2))
    part = 4 * MATRIX // 2
    assert [one.nbytes for one in of_role(recording.allocations, TensorRole.REDUCTION_INPUT)] == [4 * MATRIX] * 3
    sums = of_role(recording.allocations, TensorRole.GRADIENT_SUM)
    (averaged,) = of_role(recording.allocations, TensorRole.AVERAGED)
    assert [one.nbytes for one in (*sums, averaged)] == [part] * 3
    assert sums[0].died > averaged.born, "the first sum stays until the last micro-batch was added"
    assert sums[1].died < averaged.born


def test_gloo_copies_every_message_for_a_moment() -> None:
    recording = shard(one_gpu_step(), sharding(2, over_gloo=True))
    copies = of_role(recording.allocations, TensorRole.GLOO_COPY)
    messages = of_role(recording.allocations, TensorRole.GATHER_BUFFER)
    messages += of_role(recording.allocations, TensorRole.REDUCTION_INPUT)
    assert sorted(one.nbytes for one in copies) == sorted(one.nbytes for one in messages)
    assert all(one.died - one.born <= 2 for one in copies)
    assert of_role(shard(one_gpu_step(), sharding(2)).allocations, TensorRole.GLOO_COPY) == []


def test_what_is_added_keeps_the_order_of_births() -> None:
    recording = shard(one_gpu_step(micro_batches=2), sharding(3, replicas=2))
    births = [one.born for one in recording.allocations]
    assert births == sorted(births)
    assert all(one.died == -1 or one.born < one.died for one in recording.allocations)

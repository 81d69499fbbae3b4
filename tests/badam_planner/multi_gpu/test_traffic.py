"""What GPUs send each other, added up by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from badam_planner.multi_gpu.traffic import Traffic, traffic, traffic_of_copies, traffic_of_everything
from tests.badam_planner.multi_gpu.models import MATRIX, PARAMETERS, WIDTH, WORDS, one_gpu_step, sharding

LAYER, WORD_MATRIX = MATRIX + WIDTH, WORDS * WIDTH
WHOLE = 2 * WORD_MATRIX + 2 * LAYER


def test_a_step_gathers_all_units_and_those_of_backward_again_and_reduces_the_active_one() -> None:
    found = traffic(one_gpu_step(), sharding(2))
    assert found == Traffic(gathers=6, gathered_bytes=2 * (WHOLE + 2 * LAYER), reduces=1, reduced_bytes=4 * MATRIX)


def test_every_micro_batch_sends_as_much() -> None:
    one, three = (traffic(one_gpu_step(micro_batches=number), sharding(2)) for number in (1, 3))
    assert (three.gathers, three.gathered_bytes) == (3 * one.gathers, 3 * one.gathered_bytes)
    assert (three.reduces, three.reduced_bytes) == (3 * one.reduces, 3 * one.reduced_bytes)


def test_rows_that_do_not_divide_are_sent_with_their_padding() -> None:
    found = traffic(one_gpu_step(), sharding(3))  # 10 rows become 12, 4 rows 6
    padded_layer = 6 * WIDTH + 6
    assert found.gathered_bytes == 2 * (2 * 12 * WIDTH + 4 * padded_layer)
    assert found.reduced_bytes == 4 * 6 * WIDTH


def test_cut_copies_average_their_part_once_a_step_however_many_micro_batches_there_are() -> None:
    for number in (1, 3):
        found = traffic(one_gpu_step(micro_batches=number), sharding(2, replicas=2))
        assert (found.averages, found.averaged_bytes) == (1, 4 * MATRIX // 2)
    assert traffic(one_gpu_step(), sharding(2)).averages == 0


def test_full_training_gathers_all_but_the_root_twice_and_reduces_everything() -> None:
    found = traffic_of_everything(sharding(2), 3)
    assert found.gathers == 3 * 7
    assert found.gathered_bytes == 3 * 2 * (2 * WHOLE - WORD_MATRIX)
    assert found.reduced_bytes == 3 * 4 * WHOLE


def test_whole_copies_send_gradients_in_one_message() -> None:
    own, full = traffic_of_copies(sharding(1, replicas=4))
    assert own == Traffic(0, 0, 0, 0, averages=1, averaged_bytes=4 * MATRIX)
    assert full.averaged_bytes == 4 * sum(info.numel for info in PARAMETERS)


@pytest.mark.parametrize(("shards", "replicas", "sent"), [(1, 1, 0), (4, 1, 900), (1, 4, 150), (4, 2, 1000)])
def test_rings_send_all_but_one_part_and_averages_go_round_twice(shards: int, replicas: int, sent: int) -> None:
    messages = Traffic(1, 1000, 1, 200, 1, 100)
    if shards == 1:
        messages = replace(messages, gathered_bytes=0, reduced_bytes=0)
    assert messages.sent_bytes(shards, replicas) == sent

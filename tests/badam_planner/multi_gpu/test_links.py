"""How long messages take."""

from __future__ import annotations

import pytest

from badam_planner.multi_gpu.links import BETWEEN_NODES, LINKS, step_range, transfer_times
from tests.badam_planner.multi_gpu.targets import gpus_of


def test_a_ring_that_leaves_a_node_is_as_slow_as_the_link_between_nodes() -> None:
    inside = dict(transfer_times(gpus_of("fsdp2", 8), 10**9, 0))
    assert inside[LINKS[0].name] == pytest.approx(1e9 / LINKS[0].bytes_per_second)
    assert max(inside.values()) > min(inside.values())
    outside = transfer_times(gpus_of("fsdp2", 16), 10**9, 0)
    assert all(time >= 1e9 / 50e9 for _, time in outside)
    assert transfer_times(gpus_of("ddp", 16), 0, 10**9) == outside


def test_copies_within_machines_send_gradients_alone_between_them() -> None:
    times = dict(transfer_times(gpus_of("fsdp2", 16, 8), 9 * 10**9, 10**9))
    assert times[f"{LINKS[0].name} and {BETWEEN_NODES.name}"] == pytest.approx(9e9 / 450e9 + 1e9 / 50e9)
    straddling = dict(transfer_times(gpus_of("fsdp2", 18, 6), 9 * 10**9, 10**9))
    assert straddling[f"{LINKS[0].name} and {BETWEEN_NODES.name}"] == pytest.approx(10e9 / 50e9)
    one_machine = dict(transfer_times(gpus_of("fsdp2", 8, 4), 9 * 10**9, 10**9))
    assert one_machine[LINKS[0].name] == pytest.approx(10e9 / 450e9)


def test_a_step_takes_the_sum_where_nothing_overlaps_and_from_the_longer_part_on_where_it_does() -> None:
    assert step_range(3.0, 2.0, overlaps=True) == (3.0, 5.0)
    assert step_range(3.0, 2.0, overlaps=False) == (5.0, 5.0)

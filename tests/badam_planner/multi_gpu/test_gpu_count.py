"""How many GPUs are taken, and into what groups they are divided."""

from __future__ import annotations

import pytest

from badam.plan import Target
from badam_planner.multi_gpu.gpu_count import shard_sizes, smallest_number


@pytest.mark.parametrize("wanted", [1, 2, 3, 7, 8, 100])
def test_the_smallest_number_of_cards_is_found(wanted: int) -> None:
    assert smallest_number(lambda cards: cards >= wanted) == wanted


def test_no_number_of_cards_is_found_where_none_fits() -> None:
    assert smallest_number(lambda _: False) is None


@pytest.mark.parametrize(
    ("cards", "per_node", "sizes"),
    [(8, 8, [2, 4, 8]), (48, 8, [2, 4, 8, 16, 24, 48]), (12, 8, [2, 4, 12]), (12, 16, [2, 3, 4, 6, 12]), (7, 4, [7])],
)
def test_groups_that_straddle_machines_are_not_tried(cards: int, per_node: int, sizes: list[int]) -> None:
    assert shard_sizes(cards, per_node) == sizes


def test_every_layout_of_a_plan_deals_out_all_cards() -> None:
    with pytest.raises(ValueError, match="16 cards cannot be divided into groups of 6"):
        Target(gpu="cpu", total_bytes=1, usable_bytes=1, engine="fsdp2", num_gpus=16, shard_size=6)
    with pytest.raises(ValueError, match="needs the engine fsdp2, not zero3"):
        Target(gpu="cpu", total_bytes=1, usable_bytes=1, engine="zero3", num_gpus=16, shard_size=8)
    with pytest.raises(ValueError, match="those of the engine ddp"):
        Target(gpu="cpu", total_bytes=1, usable_bytes=1, engine="fsdp2", num_gpus=16, shard_size=1)

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from badam_planner.search.settings import (
    MemorySetting,
    SmallerBatch,
    ladder,
    recommended_index,
    smaller_batch,
    strategies,
)


def test_everything_open_is_tried_fastest_first_and_leanest_last() -> None:
    assert ladder("auto", "auto", can_chunk=True) == (
        MemorySetting("none", "full"),
        MemorySetting("none", "chunked"),
        MemorySetting("all", "full"),
        MemorySetting("all", "chunked"),
    )


def test_expandable_segments_are_tried_before_anything_that_costs_time() -> None:
    assert ladder("auto", "full", can_chunk=True, expandable_segments="auto") == (
        MemorySetting("none", "full"),
        MemorySetting("none", "full", expandable_segments=True),
        MemorySetting("all", "full"),
        MemorySetting("all", "full", expandable_segments=True),
    )
    assert ladder("all", "full", can_chunk=True, expandable_segments="on") == (MemorySetting("all", "full", True),)
    assert ladder("all", "full", can_chunk=True, expandable_segments="off") == (MemorySetting("all", "full"),)


@pytest.mark.parametrize(
    ("checkpointing", "loss", "can_chunk", "expected"),
    [
        ("none", "auto", True, [("none", "full"), ("none", "chunked")]),
        ("auto", "full", True, [("none", "full"), ("all", "full")]),
        ("auto", "auto", False, [("none", "full"), ("all", "full")]),
        ("all", "chunked", True, [("all", "chunked")]),
        ("none", "full", False, [("none", "full")]),
        ("all", "chunked", False, [("all", "chunked")]),  # asked for by name: the loss itself says why it cannot
    ],
)
def test_a_lever_that_was_set_is_not_moved(
    checkpointing: str, loss: str, can_chunk: bool, expected: list[tuple[str, str]]
) -> None:
    found = ladder(checkpointing, loss, can_chunk)
    assert [(setting.checkpointing, setting.loss) for setting in found] == expected


def test_partitions_are_tried_from_large_blocks_to_small_ones() -> None:
    assert strategies("badam", "auto") == ("layer", "attn-mlp", "matrix")


@pytest.mark.parametrize("partition", ["layer", "attn-mlp", "matrix"])
def test_a_partition_asked_for_is_the_only_one_tried(partition: str) -> None:
    assert strategies("badam", partition) == (partition,)


def test_full_adam_has_one_partition_whatever_was_asked_for() -> None:
    assert strategies("adam", "auto") == strategies("adam", "matrix") == ("full",)


@pytest.mark.parametrize(("fits", "expected"), [([False, True, True], 1), ([True], 0), ([False, False], 0)])
def test_the_first_that_fits_is_recommended(fits: list[bool], expected: int) -> None:
    assert recommended_index(fits) == expected


def test_relief_halves_the_batch_and_then_the_length() -> None:
    assert list(smaller_batch(4, 300)) == [
        SmallerBatch(4, 300),
        SmallerBatch(2, 300, ("--batch-size 2",)),
        SmallerBatch(1, 300, ("--batch-size 1",)),
        SmallerBatch(1, 150, ("--batch-size 1", "--seq-len 150")),
        SmallerBatch(1, 75, ("--batch-size 1", "--seq-len 75")),
    ]


def test_sequences_are_not_cut_below_the_shortest_useful_one() -> None:
    assert list(smaller_batch(1, 128, shortest=64))[-1].seq_len == 64
    assert list(smaller_batch(1, 127, shortest=64))[-1].seq_len == 127


@given(st.integers(1, 4096), st.integers(1, 100_000))
def test_every_relief_is_smaller_than_the_one_before_and_names_its_size(batch_size: int, seq_len: int) -> None:
    steps = list(smaller_batch(batch_size, seq_len))
    assert (steps[0].batch_size, steps[0].seq_len, steps[0].options) == (batch_size, seq_len, ())
    for one, other in pairwise(steps):
        assert (other.batch_size * other.seq_len) < (one.batch_size * one.seq_len)
        named = dict(option.split() for option in other.options)
        assert int(named["--batch-size"]) == other.batch_size
        assert int(named.get("--seq-len", seq_len)) == other.seq_len

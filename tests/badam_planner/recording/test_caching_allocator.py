from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from badam.units import KIB, MIB
from badam_planner.recording.caching_allocator import AllocationRefused, CachingAllocator
from tests.badam_planner.recording import simulated

ROUNDING = 512


allocator_after = partial(simulated.allocator_after, CachingAllocator)


# -- rounding and segments


@pytest.mark.parametrize(
    ("size", "taken", "segment"),
    [
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (12 * MIB + 512, 12 * MIB + 512, 14 * MIB),
        (13 * MIB, 14 * MIB, 14 * MIB),  # what is left of the segment is too little to be split off
    ],
)
def test_the_first_request_decides_the_segment(size: int, taken: int, segment: int) -> None:
    allocator = CachingAllocator()
    assert allocator.allocate(0, size) == taken
    assert (allocator.allocated, allocator.reserved) == (taken, segment)


def test_an_empty_request_takes_nothing() -> None:
    allocator = allocator_after(0)
    assert (allocator.allocated, allocator.reserved) == (0, 0)
    allocator.release(0)
    assert (allocator.allocated, allocator.reserved) == (0, 0)


def test_small_requests_share_a_segment_until_it_is_full() -> None:
    assert allocator_after(*[512 * KIB] * 4).reserved == 2 * MIB
    assert allocator_after(*[512 * KIB] * 5).reserved == 4 * MIB


def test_medium_requests_share_a_segment_of_twenty() -> None:
    assert allocator_after(5 * MIB, 5 * MIB, 5 * MIB, 5 * MIB).reserved == 20 * MIB
    assert allocator_after(9 * MIB, 9 * MIB, 9 * MIB).reserved == 40 * MIB


def test_small_requests_never_come_from_the_segments_of_large_ones() -> None:
    allocator = allocator_after(2 * MIB, MIB)
    assert allocator.reserved == 20 * MIB + 2 * MIB


# -- splitting


@pytest.mark.parametrize(("rest", "taken"), [(MIB, 20 * MIB), (MIB + 512, 19 * MIB - 512)])
def test_a_large_block_is_split_only_if_more_than_one_mebibyte_is_left(rest: int, taken: int) -> None:
    allocator = allocator_after(20 * MIB)
    allocator.release(0)
    assert allocator.allocate(1, 20 * MIB - rest) == taken
    assert allocator.reserved == 20 * MIB


def test_a_small_block_is_split_down_to_the_last_rounding() -> None:
    allocator = allocator_after(MIB, MIB - 512)
    assert allocator.allocated == 2 * MIB - 512
    allocator.allocate(2, 1)
    assert (allocator.allocated, allocator.reserved) == (2 * MIB, 2 * MIB)


# -- best fit


def test_the_smallest_free_block_that_holds_a_request_is_taken() -> None:
    allocator = allocator_after(30 * MIB, 14 * MIB, 22 * MIB)
    for handle in range(3):
        allocator.release(handle)
    assert allocator.allocate(3, 13 * MIB + 512) == 14 * MIB  # not split off from the 22 or the 30
    allocator.allocate(4, 22 * MIB)
    allocator.allocate(5, 30 * MIB)
    assert allocator.reserved == 66 * MIB


def test_among_equal_blocks_the_lowest_address_is_taken() -> None:
    allocator = allocator_after(*[256 * KIB] * 8)
    for handle in (6, 1, 4):
        allocator.release(handle)
    allocator.allocate("first", 256 * KIB)
    allocator.release(0)  # next to 1: they would be one block of 512 KiB if 1 were still free
    allocator.allocate("large", 512 * KIB)
    assert allocator.reserved == 4 * MIB
    allocator.release("first")
    allocator.release("large")
    allocator.allocate("again", 512 * KIB)
    assert allocator.reserved == 4 * MIB
    allocator.empty_cache()  # "again" is in the first segment, where 0 and 1 are one block now
    assert allocator.reserved == 2 * MIB


def test_a_repeated_step_may_reserve_more_because_best_fit_starts_from_other_segments() -> None:
    allocator = CachingAllocator()
    sizes = (3 * MIB, 17 * MIB + 512, 17 * MIB)
    for handle, size in enumerate(sizes):  # 3 and 17 fill a segment of 20, the other one has 18 to itself
        allocator.allocate(handle, size)
    assert allocator.reserved == 38 * MIB
    for handle in range(3):
        allocator.release(handle)
    for handle, size in enumerate(sizes):  # the segment of 18 fits 3 best, which leaves no room for 17
        allocator.allocate(handle, size)
    assert allocator.reserved == 56 * MIB


# -- releasing


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_free_neighbours_become_one_block_in_whatever_order_they_are_released(order: tuple[int, int, int]) -> None:
    allocator = allocator_after(6 * MIB, 7 * MIB, 7 * MIB)
    for handle in order:
        allocator.release(handle)
    assert allocator.allocate("all", 20 * MIB) == 20 * MIB
    assert allocator.reserved == 20 * MIB


def test_blocks_of_different_segments_never_become_one() -> None:
    allocator = allocator_after(10 * MIB, 10 * MIB)
    allocator.release(0)
    allocator.release(1)
    allocator.allocate("both", 20 * MIB)
    assert allocator.reserved == 40 * MIB


def test_a_free_block_between_two_taken_ones_does_not_grow() -> None:
    allocator = allocator_after(6 * MIB, 7 * MIB, 7 * MIB)
    allocator.release(1)
    allocator.allocate("large", 8 * MIB)
    assert allocator.reserved == 40 * MIB


def test_released_memory_stays_reserved_and_is_used_again() -> None:
    allocator = allocator_after(64 * MIB)
    allocator.release(0)
    assert (allocator.allocated, allocator.reserved) == (0, 64 * MIB)
    allocator.allocate(1, 64 * MIB)
    assert allocator.reserved == 64 * MIB


def test_emptying_the_cache_gives_back_only_segments_that_are_wholly_free() -> None:
    allocator = allocator_after(64 * MIB, 5 * MIB, 5 * MIB, 512)
    for handle in (0, 1, 3):
        allocator.release(handle)
    allocator.empty_cache()
    assert (allocator.allocated, allocator.reserved) == (5 * MIB, 20 * MIB)
    allocator.release(2)
    allocator.empty_cache()
    assert allocator.reserved == 0
    allocator.allocate(4, 512)
    assert allocator.reserved == 2 * MIB
    assert (allocator.peak_allocated, allocator.peak_reserved) == (74 * MIB + 512, 86 * MIB)


# -- a card that is full


def test_cached_segments_are_given_back_before_a_request_is_refused() -> None:
    allocator = allocator_after(40 * MIB, capacity=64 * MIB)
    allocator.release(0)
    allocator.allocate(1, 60 * MIB)
    assert allocator.reserved == 60 * MIB


def test_a_request_beyond_the_capacity_is_refused_with_the_numbers() -> None:
    allocator = allocator_after(40 * MIB, capacity=64 * MIB)
    with pytest.raises(AllocationRefused, match=rf"{30 * MIB} bytes are needed, {24 * MIB} of {64 * MIB} are left"):
        allocator.allocate(1, 30 * MIB)
    assert (allocator.allocated, allocator.reserved) == (40 * MIB, 40 * MIB)
    allocator.allocate(2, 24 * MIB)
    assert allocator.reserved == 64 * MIB


def test_fragmented_memory_can_refuse_what_would_fit_in_bytes() -> None:
    allocator = allocator_after(9 * MIB, 2 * MIB, 9 * MIB, capacity=24 * MIB)
    allocator.release(0)
    allocator.release(2)
    with pytest.raises(AllocationRefused):
        allocator.allocate(3, 12 * MIB)


# -- what holds for all sequences

SIZES = st.one_of(
    st.integers(0, 4096), st.integers(1, 3 * MIB), st.integers(9 * MIB, 12 * MIB), st.integers(1, 64 * MIB)
)


@dataclass
class Model:
    """Where every live block lies, read from the allocator after each request: an account of its own."""

    allocator: CachingAllocator = field(default_factory=CachingAllocator)
    requested: dict[int, int] = field(default_factory=dict)
    taken: dict[int, int] = field(default_factory=dict)

    def check(self) -> None:
        allocator = self.allocator
        assert allocator.allocated == sum(self.taken.values())
        assert sum(self.requested.values()) <= allocator.allocated <= allocator.reserved
        assert allocator.peak_allocated <= allocator.peak_reserved
        blocks = [block for block, _ in allocator._held.values()]
        blocks += [block for pool in allocator._pools.values() for block in pool.blocks.values()]
        by_segment: dict[int, list[tuple[int, int, bool]]] = {}
        for block in blocks:
            by_segment.setdefault(block.segment, []).append((block.offset, block.size, block.free))
        assert by_segment.keys() == allocator._segments.keys()
        for segment, parts in by_segment.items():
            end = 0
            before_is_free = False
            for offset, size, free in sorted(parts):
                assert offset == end, "blocks of a segment overlap or leave a hole"
                assert not (free and before_is_free), "two free neighbours were not merged"
                end, before_is_free = offset + size, free
            assert end == allocator._segments[segment]
        assert sum(allocator._segments.values()) == allocator.reserved


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(SIZES, st.just(None), st.floats(0, 1, exclude_max=True)), max_size=40))
def test_every_sequence_leaves_segments_tiled_without_overlap_and_ends_empty(steps: list[int | float | None]) -> None:
    """An integer allocates so many bytes, a float releases the live block at that place, None empties the cache."""
    model = Model()
    peaks = (0, 0)
    for handle, step in enumerate(steps):
        if step is None:
            model.allocator.empty_cache()
        elif isinstance(step, int):
            model.taken[handle] = model.allocator.allocate(handle, step)
            model.requested[handle] = step
        elif model.taken:
            chosen = sorted(model.taken)[int(step * len(model.taken))]
            model.allocator.release(chosen)
            del model.taken[chosen], model.requested[chosen]
        model.check()
        now = (model.allocator.peak_allocated, model.allocator.peak_reserved)
        assert now[0] >= max(peaks[0], model.allocator.allocated)
        assert now[1] >= max(peaks[1], model.allocator.reserved)
        peaks = now
    for handle in model.taken:
        model.allocator.release(handle)
    assert model.allocator.allocated == 0
    model.allocator.empty_cache()
    assert model.allocator.reserved == 0
    assert not model.allocator._segments


@settings(max_examples=100, deadline=None)
@given(st.lists(SIZES, min_size=1, max_size=12), st.integers(0, 96))
def test_a_capacity_is_never_exceeded(sizes: list[int], mebibytes: int) -> None:
    allocator = CachingAllocator(capacity=mebibytes * MIB)
    for handle, size in enumerate(sizes):
        try:
            allocator.allocate(handle, size)
        except AllocationRefused:
            allocator.release(handle - 1)
        assert allocator.peak_reserved <= mebibytes * MIB


@given(st.lists(st.integers(1, 8 * MIB), max_size=20))
def test_a_repeated_step_of_small_and_medium_requests_reserves_nothing_more(sizes: list[int]) -> None:
    first, second = simulated.peaks_of_a_repeated_step(CachingAllocator(), sizes)
    assert first == second

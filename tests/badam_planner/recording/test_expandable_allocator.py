"""The allocator with expandable segments against what follows from its documented rules."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from badam.units import KIB, MIB
from badam_planner.recording.caching_allocator import AllocationRefused, CachingAllocator
from badam_planner.recording.expandable_allocator import ExpandableAllocator
from tests.badam_planner.recording import simulated

ROUNDING = 512
PAGE, SMALL_PAGE = 20 * MIB, 2 * MIB


allocator_after = partial(simulated.allocator_after, ExpandableAllocator)


@pytest.mark.parametrize(
    ("size", "taken", "mapped"),
    [
        (1, 512, SMALL_PAGE),
        (MIB, MIB, SMALL_PAGE),
        (MIB + 1, MIB + 512, PAGE),
        (20 * MIB, 20 * MIB, PAGE),
        (20 * MIB + 1, 20 * MIB + 512, 2 * PAGE),
        (45 * MIB, 45 * MIB, 3 * PAGE),
    ],
)
def test_the_first_request_maps_whole_pages_and_takes_only_itself(size: int, taken: int, mapped: int) -> None:
    allocator = ExpandableAllocator()
    assert allocator.allocate(0, size) == taken
    assert (allocator.allocated, allocator.reserved) == (taken, mapped)


def test_an_empty_request_takes_nothing() -> None:
    allocator = allocator_after(0)
    allocator.release(0)
    assert (allocator.allocated, allocator.reserved) == (0, 0)


def test_a_request_uses_the_free_end_of_what_is_mapped_and_maps_only_the_rest() -> None:
    assert allocator_after(15 * MIB, 20 * MIB).reserved == 2 * PAGE  # 5 MiB of the first page are used
    assert allocator_after(15 * MIB, 26 * MIB).reserved == 3 * PAGE


def test_requests_of_growing_size_leave_no_slivers() -> None:
    """What the option is for: each request is larger than what was freed, and still reuses it."""
    sizes = [64 * MIB + step * MIB for step in range(30)]
    usual, expandable = CachingAllocator(), ExpandableAllocator()
    for allocator in (usual, expandable):
        for step, size in enumerate(sizes):
            allocator.allocate(step, size)
            allocator.release(step)
    assert expandable.peak_reserved == 5 * PAGE  # the largest, 93 MiB
    assert usual.peak_reserved > 10 * expandable.peak_reserved


def test_even_large_blocks_are_split_down_to_the_last_rounding() -> None:
    allocator = allocator_after(20 * MIB)
    allocator.release(0)
    assert allocator.allocate(1, 20 * MIB - ROUNDING) == 20 * MIB - ROUNDING
    allocator.allocate(2, 2 * MIB)
    assert allocator.reserved == 2 * PAGE


def test_a_block_in_between_is_used_before_the_end_that_can_grow() -> None:
    allocator = allocator_after(6 * MIB, 8 * MIB, 3 * MIB)  # 3 MiB are left of the page
    allocator.release(1)  # 8 MiB between two taken blocks; the end, 3 MiB, is the better fit by size alone
    for handle, size in enumerate((2 * MIB, 3 * MIB, 3 * MIB, 3 * MIB), start=3):
        allocator.allocate(handle, size)
    assert allocator.reserved == PAGE  # had the end been split first, the last one would need another page


def test_small_requests_never_come_from_the_pages_of_large_ones() -> None:
    allocator = allocator_after(4 * MIB, 1 * KIB)
    assert allocator.reserved == PAGE + SMALL_PAGE


def test_free_neighbours_become_one_block() -> None:
    allocator = allocator_after(*[5 * MIB] * 4)
    for handle in (0, 2, 1):
        allocator.release(handle)
    allocator.allocate(9, 15 * MIB)
    assert allocator.reserved == PAGE


def test_pages_within_a_range_are_given_back_and_mapped_again_at_the_lowest_address() -> None:
    allocator = allocator_after(20 * MIB, 40 * MIB, 20 * MIB)
    allocator.release(1)
    allocator.empty_cache()
    assert allocator.reserved == 2 * PAGE
    allocator.allocate(3, 30 * MIB)  # fits where the 40 were
    assert allocator.reserved == 4 * PAGE
    allocator.release(2)
    allocator.allocate(4, 30 * MIB)  # 10 that are left there, and the 20 behind
    assert allocator.reserved == 4 * PAGE


def test_a_page_that_is_partly_taken_is_not_given_back() -> None:
    allocator = allocator_after(15 * MIB, 30 * MIB, 15 * MIB)  # pages at 0, 20, 40
    allocator.release(1)  # 15 to 45: one whole page
    allocator.empty_cache()
    assert allocator.reserved == 2 * PAGE
    assert allocator.allocated == 30 * MIB


def test_cached_pages_are_given_back_before_a_request_is_refused() -> None:
    allocator = allocator_after(*[512 * KIB] * 40, 20 * MIB, capacity=2 * PAGE)
    for handle in range(40):
        allocator.release(handle)
    assert allocator.reserved == 2 * PAGE
    allocator.allocate("next", 20 * MIB)
    assert (allocator.reserved, allocator.releases) == (2 * PAGE, 1)
    with pytest.raises(AllocationRefused, match="41943040 of 41943040"):
        allocator.allocate("too much", 2 * MIB)


def test_fragmented_memory_serves_what_the_usual_allocator_must_refuse() -> None:
    """Free pages that do not touch are given back and mapped where they do."""
    sizes = [20 * MIB] * 6
    usual = CachingAllocator(120 * MIB)
    usual.allocate("whole", 120 * MIB)
    usual.release("whole")
    expandable = ExpandableAllocator(120 * MIB)
    for allocator in (usual, expandable):
        for handle, size in enumerate(sizes):
            allocator.allocate(handle, size)
        for handle in (0, 2, 4):
            allocator.release(handle)
    expandable.allocate("large", 60 * MIB)
    assert expandable.reserved == 120 * MIB
    with pytest.raises(AllocationRefused):
        usual.allocate("large", 60 * MIB)


sizes_in_bytes = st.one_of(
    st.integers(1, 64 * KIB), st.integers(64 * KIB, 2 * MIB), st.integers(2 * MIB, 70 * MIB), st.just(0)
)
steps = st.lists(st.one_of(sizes_in_bytes, st.floats(0, 0.999), st.none()), max_size=60)


@settings(max_examples=150, deadline=None)
@given(steps)
def test_every_sequence_leaves_ranges_tiled_and_ends_empty(steps: list[int | float | None]) -> None:
    """A number of bytes allocates, a fraction releases that one of the live handles, None empties the cache."""
    allocator = ExpandableAllocator()
    live: dict[int, int] = {}
    for handle, step in enumerate(steps):
        if step is None:
            allocator.empty_cache()
        elif isinstance(step, float):
            if live:
                chosen = list(live)[int(step * len(live))]
                allocator.release(chosen)
                del live[chosen]
        else:
            live[handle] = allocator.allocate(handle, step)
        assert allocator.allocated == sum(live.values())
        assert allocator.reserved >= allocator.allocated
        assert_tiled(allocator)
    for handle in live:
        allocator.release(handle)
    allocator.empty_cache()
    assert (allocator.allocated, allocator.reserved) == (0, 0)


def assert_tiled(allocator: ExpandableAllocator) -> None:
    """Ranges follow each other without gap, kinds do not touch themselves, whole pages are mapped."""
    mapped = 0
    for pool in allocator._pools.values():
        known = [item for item, where in allocator._held.values() if where is pool] + list(pool.at.values())
        known.sort(key=lambda item: item.start)
        end = 0
        for item, following in zip(known, [*known[1:], None], strict=True):
            assert item.start == end
            assert item.after is following
            assert item.mapped or item.free
            if following is not None and item.free and following.free:
                assert item.mapped != following.mapped
            if not item.mapped:
                assert item.start % pool.page == 0
            end += item.size
            mapped += item.size if item.mapped else 0
        assert sorted(pool.free) == pool.free == sorted((i.size, i.start) for i in known if i.free and i.mapped)
        assert pool.unmapped == [i.start for i in known if not i.mapped]
    assert mapped == allocator.reserved


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30 * MIB), max_size=40), st.integers(20, 200))
def test_a_capacity_is_never_exceeded(sizes: list[int], mebibytes: int) -> None:
    allocator = ExpandableAllocator(mebibytes * MIB)
    for handle, size in enumerate(sizes):
        try:
            allocator.allocate(handle, size)
        except AllocationRefused:
            allocator.release(handle - 1)
            assert_tiled(allocator)
        assert allocator.reserved <= mebibytes * MIB


@settings(max_examples=60, deadline=None)
@given(st.lists(sizes_in_bytes, min_size=1, max_size=30))
def test_a_repeated_step_reserves_nothing_more(sizes: list[int]) -> None:
    first, second = simulated.peaks_of_a_repeated_step(ExpandableAllocator(), sizes)
    assert first == second

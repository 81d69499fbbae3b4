"""The account of live memory against a model that is a dictionary of sizes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from badam.profiling.memory.cpu import Account, Mark
from badam.vocabulary import Category, Phase

sizes = st.integers(min_value=1, max_value=1000)
actions = st.lists(st.tuples(st.integers(0, 5), sizes, st.sampled_from([*Phase, None])), max_size=60)


@given(actions)
@settings(max_examples=60, deadline=None)
def test_replaying_keeps_the_account_of_a_simple_model(script: list[tuple[int, int, Phase | None]]) -> None:
    """Six addresses are handed out and taken back in any order, also twice in a row; phases change in between."""
    account = Account()
    live: dict[int, int] = {}
    events: list[tuple[int, int]] = []
    marks: list[Mark] = []
    phase = Phase.SETUP
    peaks = {phase: 0}
    for address, nbytes, change in script:
        if change is not None:
            phase = change
            marks.append(Mark(phase, {address: Category.GRADIENT}))
            events.append((len(marks) - 1, 0))
        elif address in live and nbytes % 2:
            events.append((address, -live.pop(address)))
        else:
            live[address] = nbytes
            events.append((address, nbytes))
        peaks[phase] = max(peaks.get(phase, 0), sum(live.values()))
    result = account.replay(events, marks)
    assert account.live_bytes == sum(live.values())
    assert result.peak_by_phase == peaks
    assert sum(result.by_category.values()) == result.peak_bytes


def test_a_block_recognized_after_the_peak_is_known_at_the_peak() -> None:
    account = Account()
    marks = [Mark(Phase.BACKWARD), Mark(Phase.STEP, {1: Category.GRADIENT})]
    events = [(0, 0), (1, 100), (2, 50), (2, -50), (1, 0)]
    result = account.replay(events, marks)
    assert result.peak_by_phase == {Phase.SETUP: 0, Phase.BACKWARD: 150, Phase.STEP: 100}
    assert result.by_category == {Category.GRADIENT: 100, Category.ACTIVATION: 50}


def test_an_address_used_again_is_another_block() -> None:
    account = Account()
    events = [(1, 100), (0, 0), (1, -100), (1, 300)]
    result = account.replay(events, [Mark(None, {1: Category.MASTER})])
    assert result.by_category == {Category.ACTIVATION: 300}


def test_after_a_pause_named_blocks_are_what_exists_and_others_as_they_were() -> None:
    account = Account()
    account.take_in(1, 10, Category.MASTER)  # released in the pause
    account.take_in(2, 20, Category.MASTER)  # kept
    account.take_in(3, 30)  # kept, nobody has a name for it
    account.take_in(4, 40)  # its address was given to a moment in the pause
    present = {2: (20, Category.MASTER), 4: (8, Category.OPTIMIZER_STATE)}
    account.forget_absent(present, [Category.MASTER, Category.OPTIMIZER_STATE])
    assert account.live_bytes == 20 + 30
    assert account.take_in(4, 8, Category.OPTIMIZER_STATE)
    assert not account.take_in(2, 20)


def test_a_boundary_tells_what_is_alive_and_the_peak_since_the_one_before() -> None:
    account = Account()
    account.take_in(9, 5)
    boundary = Mark(boundary=True)
    events = [(1, 100), (1, -100), (0, 0), (2, 20), (1, 0), (9, -5), (2, 0)]
    result = account.replay(events, [boundary] * 3)
    assert result.boundaries == ((5, 105), (25, 25), (20, 25))


def test_memory_inside_a_mapped_file_is_a_part_of_it() -> None:
    account = Account()
    account.take_in(1000, 500)
    account.take_in(2000, 100)
    account.keep_whole([1064, 2000, 5000])
    assert account.block_around(1064) == account.block_around(1000) == (1000, 500)
    assert account.block_around(2050) is None, "only begins were known of this one: it is no file"
    assert not account.take_in(1300, 100, Category.PARAMETER)
    assert account.take_in(1500, 10)
    assert account.live_bytes == 610
    account.release(1000)
    assert account.block_around(1064) is None

"""Which block is active at a step is a pure function of mode, K, D and seed, and so is what a run reaches."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from badam.blocks.schedule import BlockSchedule, coverage
from badam.errors import InputError
from tests.badam.training.tiny import LAYERS, tiny_plan

MODES = ("random", "ascending", "descending", "fixed")


@st.composite
def schedules(draw: Any, modes: tuple[str, ...] = MODES) -> BlockSchedule:
    count = draw(st.integers(1, 12))
    start = draw(st.none() | st.integers(0, count - 1))
    return BlockSchedule(
        draw(st.sampled_from(modes)), draw(st.integers(1, 6)), count, seed=draw(st.integers(0, 5)), start_block=start
    )


@given(schedules())
def test_every_visit_has_exactly_k_steps_the_first_one_too(schedule: BlockSchedule) -> None:
    visits = [schedule.visit_at_step(step) for step in range(schedule.switch_every * 5)]
    assert Counter(visits) == dict.fromkeys(range(5), schedule.switch_every)
    assert [schedule.ends_visit(steps) for steps in range(schedule.switch_every)] == [False] * schedule.switch_every
    assert schedule.ends_visit(schedule.switch_every)


@given(schedules(("random", "ascending", "descending")), st.integers(0, 5))
def test_a_block_epoch_visits_every_block_once(schedule: BlockSchedule, epoch: int) -> None:
    assert sorted(schedule.order(epoch)) == list(range(schedule.num_blocks))


@given(schedules(), st.integers(0, 40))
def test_a_step_trains_the_block_of_its_visit(schedule: BlockSchedule, step: int) -> None:
    visit = step // schedule.switch_every
    assert schedule.block_at_step(step) == schedule.block_at(visit)
    epoch, position = divmod(visit, schedule.num_blocks)
    assert schedule.block_at(visit) == schedule.order(epoch)[position]


@given(schedules())
def test_the_start_block_is_the_first_in_every_mode(schedule: BlockSchedule) -> None:
    if schedule.start_block is not None:
        assert schedule.block_at_step(0) == schedule.start_block
    elif schedule.mode == "descending":
        assert schedule.block_at_step(0) == schedule.num_blocks - 1
    elif schedule.mode in ("ascending", "fixed"):
        assert schedule.block_at_step(0) == 0


@pytest.mark.parametrize("switch_every", [0, -1, -50])
@pytest.mark.parametrize("mode", MODES)
def test_k_of_zero_or_less_never_switches(mode: Any, switch_every: int) -> None:
    schedule = BlockSchedule(mode, switch_every, 4)
    assert {schedule.block_at_step(step) for step in range(500)} == {schedule.block_at(0)}
    assert not any(schedule.ends_visit(steps) for steps in range(500))


def test_fixed_stays_at_its_block() -> None:
    assert {BlockSchedule("fixed", 2, 5, start_block=3).block_at_step(step) for step in range(50)} == {3}


def test_random_orders_differ_between_epochs_and_seeds_and_repeat_for_the_same() -> None:
    orders = [BlockSchedule("random", 1, 8, seed=1).order(epoch) for epoch in range(20)]
    assert len(set(orders)) > 15
    assert orders == [BlockSchedule("random", 1, 8, seed=1).order(epoch) for epoch in range(20)]
    assert BlockSchedule("random", 1, 8, seed=2).order(0) != orders[0]


def test_random_orders_are_the_same_on_every_platform_and_version() -> None:
    assert BlockSchedule("random", 1, 6, seed=0).order(0) == (4, 1, 2, 3, 0, 5)
    assert BlockSchedule("random", 1, 6, seed=0, start_block=3).order(0) == (3, 4, 1, 2, 0, 5)


def test_random_orders_are_uniform() -> None:
    first = Counter(BlockSchedule("random", 1, 4, seed=seed).order(0)[0] for seed in range(2000))
    assert all(400 < count < 600 for count in first.values())


def test_no_random_number_generator_is_touched() -> None:
    before = random.getstate()
    BlockSchedule("random", 1, 50).order(3)
    assert random.getstate() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sideways", 1, 2), "sideways"),
        (("random", 1, 0), "at least one block"),
        (("random", 1, 3, 0, 3), "start_block is 3, but there are 3 blocks"),
        (("random", 1, 3, 0, -1), "start_block is -1"),
    ],
)
def test_impossible_schedules_are_refused(arguments: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        BlockSchedule(*arguments)


moving_modes = st.sampled_from(["random", "ascending", "descending"])


@given(moving_modes, st.integers(1, 9), st.integers(1, 40), st.integers(0, 5))
def test_unvisited_blocks_are_those_the_schedule_never_names(mode: Any, every: int, steps: int, seed: int) -> None:
    plan = tiny_plan(schedule={"switch_mode": mode, "switch_every": every, "seed": seed})
    schedule = BlockSchedule(mode, every, LAYERS, seed)
    visited = {schedule.block_at_step(step) for step in range(steps)}
    found = coverage(plan, steps)
    assert found.unvisited == tuple(f"layer {index}" for index in range(LAYERS) if index not in visited)
    assert (found.warning() is None) == (len(visited) == LAYERS)


@given(moving_modes, st.integers(1, 40))
def test_the_offered_visit_length_gives_every_block_a_whole_visit(mode: Any, steps: int) -> None:
    offered = coverage(tiny_plan(schedule={"switch_mode": mode, "switch_every": 1000}), steps).covering_switch_every
    if offered is None:
        assert steps < LAYERS
        return
    schedule = BlockSchedule(mode, offered, LAYERS, 0)
    taken = [schedule.block_at_step(step) for step in range(steps)]
    assert all(taken.count(block) >= offered for block in range(LAYERS))


def test_too_few_steps_for_all_blocks_are_told() -> None:
    warning = coverage(tiny_plan(schedule={"switch_every": 1}), LAYERS - 1).warning()
    assert warning is not None
    assert "train longer" in warning


def test_one_fixed_block_is_what_was_asked_for() -> None:
    assert coverage(tiny_plan(schedule={"switch_mode": "fixed"}), 100).warning() is None

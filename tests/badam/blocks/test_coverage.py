"""Which blocks a run reaches, against the schedule step by step."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from badam.blocks.coverage import coverage
from badam.blocks.schedule import BlockSchedule
from tests.badam.training.tiny import LAYERS, tiny_plan

modes = st.sampled_from(["random", "ascending", "descending"])


@given(modes, st.integers(1, 9), st.integers(1, 40), st.integers(0, 5))
def test_unvisited_blocks_are_those_the_schedule_never_names(mode: Any, every: int, steps: int, seed: int) -> None:
    plan = tiny_plan(schedule={"switch_mode": mode, "switch_every": every, "seed": seed})
    schedule = BlockSchedule(mode, every, LAYERS, seed)
    visited = {schedule.block_at_step(step) for step in range(steps)}
    found = coverage(plan, steps)
    assert found.unvisited == tuple(f"layer {index}" for index in range(LAYERS) if index not in visited)
    assert (found.warning() is None) == (len(visited) == LAYERS)


@given(modes, st.integers(1, 40))
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

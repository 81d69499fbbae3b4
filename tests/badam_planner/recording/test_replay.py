"""What a second step and a second visit find of the first ones' segments."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from badam.plan import Target
from badam.units import MIB
from badam.vocabulary import Category, Phase
from badam_planner.recording.caching_allocator import AllocationRefused
from badam_planner.recording.forecast import cache_releases
from badam_planner.recording.recording import Recording
from badam_planner.recording.replay import MOST_ROUNDS, Replay, replay
from badam_planner.recording.timeline import Timeline
from tests.badam_planner.recording.recordings import Script, scripted

WEIGHTS, STATES, LOGITS = 100 * MIB, 60 * MIB, 60 * MIB


def visit(*, switches: bool = True, workspace: bool = False, growing: bool = False) -> Recording:
    """Weights; a step with logits; states in its update; a step with logits again; the states' end at the switch."""
    script = Script()
    script.birth(WEIGHTS, category=Category.PARAMETER)
    kept = []
    states = 0
    for number in range(2):
        script.phase(Phase.FORWARD)
        if workspace and number == 0:
            script.birth(10 * MIB, category=Category.WORKSPACE, gpu_only=True)
        logits = script.birth(LOGITS)
        script.phase(Phase.BACKWARD)
        script.death(logits)
        script.phase(Phase.STEP)
        if number == 0:
            states = script.birth(STATES)
        if growing:
            kept.append(script.birth(20 * MIB))
        if number == 1 and switches:
            script.phase(Phase.SWITCH)
            script.death(states)
        script.phase(Phase.SETUP)
    return script.recording


def run(recording: Recording, **options: bool) -> Replay:
    return replay(Timeline(recording, granularity=512, on_gpu=True), **options)


def test_the_first_update_takes_the_segments_that_the_first_steps_logits_left() -> None:
    found = run(visit())
    assert found.allocator.peak_allocated == WEIGHTS + STATES + LOGITS
    assert found.allocator.peak_reserved == WEIGHTS + STATES + LOGITS  # and the second step takes segments of its own


def test_a_visit_is_repeated_until_the_segments_are_those_of_an_earlier_one() -> None:
    assert run(visit()).rounds == 2
    assert run(visit(switches=False)).rounds == 2


def test_a_workspace_is_taken_once_however_many_visits_there_are() -> None:
    found = run(visit(workspace=True))
    assert found.rounds == 2
    assert found.allocator.peak_allocated == WEIGHTS + STATES + LOGITS + 10 * MIB
    assert found.allocator.peak_reserved == WEIGHTS + STATES + LOGITS + 10 * MIB


def test_what_a_repeated_step_makes_anew_takes_the_place_of_what_it_made_before() -> None:
    found = run(visit(switches=False, growing=True))
    assert found.rounds <= MOST_ROUNDS
    assert found.allocator.peak_allocated == WEIGHTS + STATES + LOGITS + 2 * 20 * MIB


def test_blocks_of_another_visit_may_find_larger_places() -> None:
    """States of 59 MiB in a place of 60 leave nothing to split off; the peak is that of the blocks."""
    script = Script()
    for number in range(2):
        script.phase(Phase.FORWARD)
        logits = script.birth(60 * MIB)
        script.phase(Phase.STEP)
        script.death(logits)
        if number == 0:
            states = script.birth(59 * MIB)
        else:
            script.death(states)
            script.phase(Phase.SWITCH)
        script.phase(Phase.SETUP)
    found = run(script.recording)
    assert found.by_phase[Phase.FORWARD].nbytes == found.allocator.peak_allocated == 120 * MIB
    assert max(found.sizes) == 60 * MIB


def growing_within_a_step() -> Timeline:
    """In each step a tensor of 50 MiB, and when it is gone one of 60 MiB."""
    script = Script()
    for number in range(2):
        script.phase(Phase.FORWARD)
        script.death(script.birth(50 * MIB))
        script.phase(Phase.STEP)
        script.death(script.birth(60 * MIB))
        if number == 1:
            script.phase(Phase.SWITCH)
        script.phase(Phase.SETUP)
    return Timeline(script.recording, granularity=512, on_gpu=True)


def test_at_the_limit_free_segments_go_back_once_and_the_larger_one_serves_all_later_steps() -> None:
    roomy, tight = replay(growing_within_a_step()), replay(growing_within_a_step(), capacity=100 * MIB)
    assert (roomy.allocator.peak_reserved, roomy.allocator.releases) == (110 * MIB, 0)
    assert (tight.allocator.peak_reserved, tight.allocator.releases) == (60 * MIB, 1)
    assert tight.releases_per_step == 0  # not in the last round
    with pytest.raises(AllocationRefused):
        replay(growing_within_a_step(), capacity=59 * MIB)


def test_how_often_cache_goes_back_within_a_targets_memory() -> None:
    target = Target(gpu="rtx3090", total_bytes=2**30, usable_bytes=110 * MIB + 512, context_bytes=512)
    usable = {110 * MIB: 0.0, 60 * MIB: 0.0, 60 * MIB - 1: None}
    for nbytes, expected in usable.items():
        limited = target.model_copy(update={"usable_bytes": nbytes + 512})
        assert cache_releases([growing_within_a_step()], limited) == expected


def test_a_visit_to_a_block_of_another_shape_leaves_its_segments() -> None:
    """A block with states of 40 MiB in many parts and one with a single state of 60 MiB share little."""
    large, small = visit(), visit_of_many_parts()
    alone = max(run(large).allocator.peak_reserved, run(small).allocator.peak_reserved)
    timelines = [Timeline(each, granularity=512, on_gpu=True) for each in (large, small)]
    together = replay(*timelines)
    assert together.allocator.peak_reserved > alone
    assert len(together.visited) == 2
    assert max(peak.nbytes for each in together.visited for peak in each.by_phase.values()) == (
        together.allocator.peak_allocated
    )
    assert together.allocator.allocated == WEIGHTS


def visit_of_many_parts() -> Recording:
    """As :func:`visit`, with logits of 75 MiB and states in parts of 15 MiB."""
    script = Script()
    script.birth(WEIGHTS, category=Category.PARAMETER)
    states: list[int] = []
    for number in range(2):
        script.phase(Phase.FORWARD)
        logits = script.birth(75 * MIB)
        script.phase(Phase.BACKWARD)
        script.death(logits)
        script.phase(Phase.STEP)
        if number == 0:
            states = [script.birth(15 * MIB) for _ in range(3)]
        else:
            script.phase(Phase.SWITCH)
            script.death(*states)
        script.phase(Phase.SETUP)
    return script.recording


@pytest.mark.parametrize("expandable", [False, True])
@settings(deadline=None, max_examples=50)
@given(recording=scripted())
def test_the_highest_phase_is_the_allocators_peak_whatever_happens(expandable: bool, recording: Recording) -> None:
    found = run(recording, expandable_segments=expandable)
    assert max(peak.nbytes for peak in found.by_phase.values()) == found.allocator.peak_allocated
    assert found.allocator.peak_reserved >= found.allocator.peak_allocated
    assert 1 <= found.rounds <= MOST_ROUNDS

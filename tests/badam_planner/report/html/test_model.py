from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from badam.vocabulary import Phase
from badam_planner.recording.recording import NEVER, Allocation, Recording
from badam_planner.recording.timeline import Timeline
from badam_planner.report.html.model import sample_timeline

PHASES = (Phase.SETUP, Phase.FORWARD, Phase.LOSS, Phase.BACKWARD, Phase.RECOMPUTE, Phase.BACKWARD, Phase.STEP)


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    """A few dozen allocations over seven phases; every tick is one birth or one death."""
    count = draw(st.integers(7, 40))
    ticks = draw(st.permutations(range(2 * count)))
    allocations = []
    starts = [(2 * count * index // len(PHASES), phase) for index, phase in enumerate(PHASES)]
    for index in range(count):
        born, died = sorted(ticks[2 * index : 2 * index + 2])
        phase = next(phase for start, phase in reversed(starts) if start <= born)
        died = NEVER if draw(st.booleans()) else died
        size = draw(st.integers(1, 10**9))
        allocations.append(Allocation(size, born, died, phase, f"layer.{index}", "aten.mm", (size,), "int8"))
    allocations.sort(key=lambda allocation: allocation.born)
    return Timeline(Recording(allocations, starts, end=2 * count))


@given(timelines(), st.integers(1, 30))
def test_thinning_keeps_the_peak_and_the_sums(timeline: Timeline, most: int) -> None:
    step = sample_timeline(timeline, title="", limit_bytes=0, most=most)
    assert max(sample.total_bytes for sample in step.samples) == timeline.peak().nbytes
    for sample in step.samples:
        live = timeline.by_category(sample.tick)
        assert {category: size for category, size in sample.by_category.items() if size} == live


@given(timelines(), st.integers(1, 30))
def test_phases_follow_each_other_and_recomputation_is_part_of_backward(timeline: Timeline, most: int) -> None:
    step = sample_timeline(timeline, title="", limit_bytes=0, most=most)
    phases = [span.phase for span in step.spans]
    assert Phase.RECOMPUTE not in phases
    assert all(first is not second for first, second in pairwise(phases))
    drawn = {sample.tick: sample.total_bytes for sample in step.samples}
    for span in step.spans:
        assert max(size for tick, size in drawn.items() if span.begin <= tick <= span.end) == span.peak_bytes
    assert len(step.samples) <= most + 3 * len(step.spans)


@given(timelines())
def test_what_lies_before_the_start_is_left_out_but_still_counted(timeline: Timeline) -> None:
    start = timeline.recording.phase_starts[1][0]
    step = sample_timeline(timeline, title="", limit_bytes=0, start=start)
    assert all(sample.tick >= start for sample in step.samples)
    whole = {sample.tick: sample.total_bytes for sample in sample_timeline(timeline, title="", limit_bytes=0).samples}
    assert all(whole[sample.tick] == sample.total_bytes for sample in step.samples)


def test_of_neighbouring_events_the_highest_is_drawn() -> None:
    lives = [(10, 0, 1), (6, 2, 3), (4, 4, 5), (3, 6, 7)]
    allocations = [Allocation(size, born, died, Phase.FORWARD, "", "", (), "") for size, born, died in lives]
    timeline = Timeline(Recording(allocations, [(0, Phase.FORWARD)], end=8))
    step = sample_timeline(timeline, title="", limit_bytes=0, most=4)
    assert [sample.total_bytes for sample in step.samples] == [10, 6, 4, 3, 0]

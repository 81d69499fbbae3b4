from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from badam.vocabulary import Category, Phase
from badam_planner.recording.recording import NEVER, Allocation, Recording, TensorRole
from badam_planner.recording.timeline import LOSS_MODULE, Timeline
from tests.badam_planner.recording.recordings import Script, scripted


def one_step() -> Script:
    """A parameter of 1000, forward that leaves 200, backward that peaks at 1350, a step that peaks at 1450."""
    script = Script()
    script.birth(1000, category=Category.PARAMETER)
    script.phase(Phase.FORWARD)
    scratch = script.birth(50, "layers.0")
    saved = script.birth(200, "layers.0")
    script.death(scratch)
    script.phase(Phase.BACKWARD)
    flowing = script.birth(100, "layers.1")
    gradient = script.birth(50, "layers.0", category=Category.GRADIENT)
    script.death(saved, flowing)
    script.phase(Phase.STEP)
    moments = script.birth(400, category=Category.OPTIMIZER_STATE)
    script.death(gradient)
    script.phase(Phase.SWITCH)
    script.death(moments)
    return script


def live_bytes(timeline: Timeline, tick: int) -> int:
    """Bytes alive just after ``tick``, counted from the recording alone."""
    pairs = zip(timeline.recording.allocations, timeline.sizes, strict=True)
    return sum(size for one, size in pairs if one.born <= tick and (one.died == NEVER or one.died > tick))


# -- peaks


def test_the_peak_has_bytes_phase_and_module() -> None:
    peak = Timeline(one_step().recording).peak()
    assert (peak.nbytes, peak.phase, peak.module) == (1450, Phase.STEP, "")


def test_every_phase_has_its_own_peak() -> None:
    peaks = Timeline(one_step().recording).peak_by_phase()
    assert {phase: peak.nbytes for phase, peak in peaks.items()} == {
        Phase.SETUP: 1000,
        Phase.FORWARD: 1250,
        Phase.BACKWARD: 1350,
        Phase.STEP: 1450,
        Phase.SWITCH: 1400,
    }
    assert peaks[Phase.BACKWARD].module == "layers.0"


def test_a_phase_starts_with_what_is_alive_even_if_nothing_happens_in_it() -> None:
    script = Script()
    script.birth(70)
    script.phase(Phase.LOSS)
    script.phase(Phase.SWITCH)
    peaks = Timeline(script.recording).peak_by_phase()
    assert peaks[Phase.LOSS].nbytes == peaks[Phase.SWITCH].nbytes == 70


def test_a_phase_that_comes_again_keeps_its_highest_peak() -> None:
    script = Script()
    for nbytes in (300, 500, 400):
        script.phase(Phase.FORWARD)
        script.death(script.birth(nbytes))
        script.phase(Phase.STEP)
    assert Timeline(script.recording).peak_by_phase()[Phase.FORWARD].nbytes == 500


def test_an_empty_recording_peaks_at_nothing() -> None:
    assert Timeline(Recording()).peak().nbytes == 0


@given(scripted())
def test_the_peak_is_the_highest_of_all_ticks(recording: Recording) -> None:
    timeline = Timeline(recording)
    highest = max(live_bytes(timeline, tick) for tick in range(recording.end))
    peak = timeline.peak()
    assert peak.nbytes == highest == live_bytes(timeline, peak.tick)
    assert peak.phase is timeline.phase_at(peak.tick)


# -- categories


@given(scripted(), st.data())
def test_categories_sum_to_the_live_bytes_at_every_tick(recording: Recording, data: st.DataObject) -> None:
    timeline = Timeline(recording, "lm_head", granularity=data.draw(st.sampled_from([1, 512])), on_gpu=True)
    tick = data.draw(st.integers(0, recording.end))
    assert sum(timeline.by_category(tick).values()) == live_bytes(timeline, tick)
    assert [size for _, _, size in timeline.live_at(tick)] == sorted(
        (size for _, _, size in timeline.live_at(tick)), reverse=True
    )


@pytest.mark.parametrize("maker", [Phase.FORWARD, Phase.RECOMPUTE])
@pytest.mark.parametrize(("survives", "expected"), [(True, Category.ACTIVATION), (False, Category.TEMPORARY)])
def test_what_backward_still_finds_is_an_activation(maker: Phase, survives: bool, expected: Category) -> None:
    script = Script()
    script.phase(maker)
    made = script.birth(8)
    if not survives:
        script.death(made)
    script.phase(Phase.BACKWARD)
    if survives:
        script.death(made)
    assert Timeline(script.recording).categories == [expected]


def test_a_forward_value_that_an_earlier_backward_preceded_needs_the_next_one() -> None:
    script = Script()
    script.phase(Phase.BACKWARD)
    script.phase(Phase.FORWARD)
    dropped, kept = script.birth(1), script.birth(2)
    script.death(dropped)
    script.phase(Phase.BACKWARD)
    script.death(kept)
    assert Timeline(script.recording).categories == [Category.TEMPORARY, Category.ACTIVATION]


def test_what_outlives_a_recording_that_ends_in_forward_is_an_activation() -> None:
    script = Script()
    script.phase(Phase.FORWARD)
    kept, dropped = script.birth(8), script.birth(8)
    script.death(dropped)
    assert Timeline(script.recording).categories[kept] is Category.ACTIVATION
    assert Timeline(script.recording).categories[dropped] is Category.TEMPORARY


@pytest.mark.parametrize(
    ("phase", "module", "expected"),
    [
        (Phase.LOSS, "anything", Category.LOGITS),
        (Phase.BACKWARD, LOSS_MODULE, Category.LOGITS),
        (Phase.BACKWARD, "lm_head", Category.LOGITS),
        (Phase.RECOMPUTE, "lm_head", Category.LOGITS),
        (Phase.BACKWARD, "layers.0", Category.TEMPORARY),
        (Phase.BACKWARD, "", Category.TEMPORARY),
        (Phase.STEP, "lm_head", Category.TEMPORARY),
        (Phase.SWITCH, "", Category.TEMPORARY),
        (Phase.SETUP, "", Category.TEMPORARY),
    ],
)
def test_what_nobody_labelled_is_told_by_phase_and_module(phase: Phase, module: str, expected: Category) -> None:
    script = Script()
    script.phase(phase)
    script.birth(8, module)
    assert Timeline(script.recording, "lm_head").categories == [expected]


def test_without_a_head_no_module_counts_as_one() -> None:
    script = Script()
    script.phase(Phase.BACKWARD)
    script.birth(8, "")
    assert Timeline(script.recording, "").categories == [Category.TEMPORARY]


@given(st.sampled_from(list(Phase)), st.sampled_from(list(Category)))
def test_a_label_wins_over_every_rule(phase: Phase, category: Category) -> None:
    script = Script()
    script.phase(phase)
    script.birth(8, "lm_head", category=category)
    assert Timeline(script.recording, "lm_head").categories == [category]


# -- sizes


def test_sizes_are_rounded_up_to_the_granularity() -> None:
    script = Script()
    for nbytes in (0, 1, 512, 513):
        script.birth(nbytes)
    assert Timeline(script.recording, granularity=512).sizes == [0, 512, 512, 1024]
    assert Timeline(script.recording).sizes == [0, 1, 512, 513]


def test_scratch_of_a_cards_kernels_counts_on_the_card_only() -> None:
    script = Script()
    script.birth(600, gpu_only=True)
    assert Timeline(script.recording).peak().nbytes == 0
    assert Timeline(script.recording, granularity=512, on_gpu=True).peak().nbytes == 1024


def test_a_resized_timeline_leaves_the_original_alone() -> None:
    timeline = Timeline(one_step().recording)
    doubled = timeline.resized([2 * size for size in timeline.sizes])
    assert doubled.peak().nbytes == 2 * timeline.peak().nbytes == 2900
    assert doubled.peak_by_phase()[Phase.SETUP].nbytes == 2 * timeline.peak_by_phase()[Phase.SETUP].nbytes > 0


# -- names


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"role": TensorRole.PARAMETER, "parameter": "layers.0.w"}, "layers.0.w 2×3 bfloat16"),
        ({"role": TensorRole.GRADIENT, "parameter": "w"}, "gradient of w 2×3 bfloat16"),
        ({"role": TensorRole.STATE, "state": "exp_avg", "parameter": "w"}, "exp_avg of w 2×3 bfloat16"),
        ({"role": TensorRole.GATHER_BUFFER}, "gather buffer of the rest 2×3 bfloat16"),
        ({"role": TensorRole.UNPACKED_WEIGHT, "module": "up"}, "unpacked weight in up 2×3 bfloat16"),
        ({"module": "layers.0.mlp"}, "layers.0.mlp: mm 2×3 bfloat16"),
        ({}, "outside the modules: mm 2×3 bfloat16"),
        ({"role": TensorRole.BATCH, "parameter": "labels", "shape": ()}, "batch labels scalar bfloat16"),
    ],
)
def test_an_allocation_describes_itself_to_a_person(fields: dict[str, object], expected: str) -> None:
    facts: dict[str, object] = {"module": "", "operation": "aten.mm.default", "shape": (2, 3), "dtype": "bfloat16"}
    allocation = Allocation(nbytes=12, born=0, died=NEVER, phase=Phase.FORWARD, **{**facts, **fields})  # type: ignore[arg-type]
    assert allocation.describe() == expected

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from badam.plan import Target
from badam.units import GIB, MIB
from badam.vocabulary import Category, Phase
from badam_planner.recording.caching_allocator import AllocationRefused
from badam_planner.recording.forecast import Forecast, forecast
from badam_planner.recording.recording import Recording, TensorRole
from badam_planner.recording.replay import replay
from badam_planner.recording.timeline import Timeline
from tests.badam_planner.recording.recordings import Script, scripted

WORKSPACE, CONTEXT = 8 * MIB + 512, 300 * MIB
CPU = Target(gpu="cpu", total_bytes=GIB, usable_bytes=GIB)
BARE_GPU = Target(gpu="card", total_bytes=GIB, usable_bytes=GIB)
GROWING_GPU = BARE_GPU.model_copy(update={"expandable_segments": True})
GPU = BARE_GPU.model_copy(update={"workspace_bytes": WORKSPACE, "context_bytes": CONTEXT})


def predict(recording: Recording, target: Target, **options: int) -> Forecast:
    return forecast(recording, target, head_module="lm_head", **options)


def one_step(workspace: int = 0) -> Recording:
    """Weights of 64 MiB; forward saves 13 MiB, which takes a segment of 14 whole; backward needs 5 MiB beside it."""
    script = Script()
    script.birth(64 * MIB, "model", category=Category.PARAMETER, role=TensorRole.PARAMETER, parameter="w")
    script.phase(Phase.FORWARD)
    if workspace:
        script.birth(workspace, category=Category.WORKSPACE, role=TensorRole.MATMUL_WORKSPACE, gpu_only=True)
    saved = script.birth(13 * MIB, "layers.0")
    script.phase(Phase.BACKWARD)
    script.death(script.birth(5 * MIB, "layers.0.mlp"))
    script.death(saved)
    script.phase(Phase.STEP)
    return script.recording


def test_on_the_cpu_all_three_peaks_are_the_live_bytes() -> None:
    found = predict(one_step(WORKSPACE), CPU)
    assert found.peak_allocated_bytes == found.peak_reserved_bytes == found.peak_device_bytes == 82 * MIB
    assert found.by_category == {
        Category.PARAMETER: 64 * MIB,
        Category.ACTIVATION: 13 * MIB,
        Category.TEMPORARY: 5 * MIB,
    }
    assert (found.peak_phase, found.peak_module) == (Phase.BACKWARD, "layers.0.mlp")


def test_on_a_card_blocks_and_segments_count() -> None:
    found = predict(one_step(), BARE_GPU)
    assert found.peak_allocated_bytes == (64 + 14 + 5) * MIB
    assert found.peak_reserved_bytes == found.peak_device_bytes == (64 + 14 + 20) * MIB


def test_ends_of_blocks_that_no_tensor_uses_are_cache() -> None:
    assert predict(one_step(), BARE_GPU).by_category[Category.CACHE] == MIB


def test_expandable_segments_reserve_whole_pages_and_split_to_the_last_rounding() -> None:
    found = predict(one_step(), GROWING_GPU)
    assert found.peak_allocated_bytes == (64 + 13 + 5) * MIB  # no block is larger than what was asked for
    assert found.peak_reserved_bytes == found.peak_device_bytes == 100 * MIB  # 82 in pages of 20
    assert Category.CACHE not in found.by_category


def test_the_device_holds_the_segments_and_the_context() -> None:
    found = predict(one_step(), GPU)
    assert found.peak_device_bytes == found.peak_reserved_bytes + CONTEXT


def test_the_workspace_is_there_from_the_first_forward_on() -> None:
    found, without = predict(one_step(WORKSPACE), GPU), predict(one_step(), BARE_GPU)
    assert found.by_category[Category.WORKSPACE] == WORKSPACE
    assert found.peak_allocated_bytes == without.peak_allocated_bytes + WORKSPACE
    assert found.by_phase[Phase.SETUP] == without.by_phase[Phase.SETUP]
    for phase in (Phase.FORWARD, Phase.BACKWARD, Phase.STEP):
        assert found.by_phase[phase] == without.by_phase[phase] + WORKSPACE


def test_the_largest_live_tensors_have_names() -> None:
    found = predict(one_step(WORKSPACE), GPU, largest=2)
    assert found.largest == ((f"w {64 * MIB} uint8", 64 * MIB), (f"layers.0: mm {13 * MIB} uint8", 13 * MIB))
    assert len(predict(one_step(WORKSPACE), GPU).largest) == 4
    assert ("workspace of matrix multiplication", WORKSPACE) in [
        (name.rsplit(" ", 2)[0], nbytes) for name, nbytes in predict(one_step(WORKSPACE), GPU).largest
    ]


def test_a_replay_with_too_little_memory_is_refused() -> None:
    timeline = Timeline(one_step())
    assert replay(timeline, capacity=98 * MIB).allocator.peak_reserved == 98 * MIB
    with pytest.raises(AllocationRefused):
        replay(timeline, capacity=98 * MIB - 1)


@settings(deadline=None)
@given(scripted(), st.sampled_from([CPU, BARE_GPU, GROWING_GPU, GPU]))
def test_categories_sum_to_the_peak_and_the_highest_phase_is_it(recording: Recording, target: Target) -> None:
    found = predict(recording, target)
    assert sum(found.by_category.values()) == found.peak_allocated_bytes
    assert all(size >= 0 for size in found.by_category.values())
    assert max(found.by_phase.values()) == found.by_phase[found.peak_phase] == found.peak_allocated_bytes
    assert found.peak_reserved_bytes >= found.peak_allocated_bytes
    assert found.peak_device_bytes == found.peak_reserved_bytes + target.context_bytes


@settings(deadline=None)
@given(scripted())
def test_the_timeline_of_blocks_peaks_where_the_allocator_does(recording: Recording) -> None:
    timeline = Timeline(recording, granularity=512, on_gpu=True)
    replayed = replay(timeline)
    peak = max(each.nbytes for each in replayed.by_phase.values())
    assert peak == replayed.allocator.peak_allocated
    if replayed.rounds == 1:  # in a later visit what an earlier one left is there too
        assert timeline.resized(replayed.sizes).peak().nbytes == peak
    assert all(given >= asked for given, asked in zip(replayed.sizes, timeline.sizes, strict=True))


@settings(deadline=None)
@given(scripted())
def test_a_card_never_needs_less_than_the_tensors(recording: Recording) -> None:
    assert predict(recording, GPU).peak_allocated_bytes >= predict(recording, CPU).peak_allocated_bytes

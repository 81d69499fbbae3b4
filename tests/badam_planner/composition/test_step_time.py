from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from badam.plan import Rates
from badam.vocabulary import Phase
from badam_planner.composition.compose import Run, compose
from badam_planner.composition.step_time import StepTimes, Work, mean_work, seconds_of, step_seconds
from badam_planner.recording.recording import MemoryTraffic, Recording

RATES = Rates(
    flops_per_second={"bfloat16": 100.0, "float32": 10.0, "float16": 50.0}, bytes_per_second=20.0, basis="for the test"
)
CYCLES = tuple((f"layers.{index}",) for index in range(4))


def test_a_product_takes_the_longer_of_computing_and_reading() -> None:
    assert seconds_of(1000, MemoryTraffic(product_bytes=100), RATES, "bfloat16") == 10.0
    assert seconds_of(1000, MemoryTraffic(product_bytes=400), RATES, "bfloat16") == 20.0
    assert seconds_of(1000, MemoryTraffic(product_bytes=100), RATES, "float32") == 100.0


def test_other_operators_take_what_their_bytes_take_on_top() -> None:
    assert seconds_of(1000, MemoryTraffic(product_bytes=100, other_bytes=60), RATES, "bfloat16") == 13.0


def test_many_small_operators_take_the_time_to_start_them() -> None:
    rates = RATES.model_copy(update={"seconds_per_operator": 1.0})
    assert seconds_of(100, MemoryTraffic(20, 20, operators=7), rates, "bfloat16") == 7.0
    assert seconds_of(100, MemoryTraffic(20, 20, operators=1), rates, "bfloat16") == 2.0


def recording() -> Recording:
    """Forward works in the embedding and in four layers, the last of which has twice as much to do."""
    places = {("", 5): 1, **{(f"layers.{index}.mlp", 10): 1 for index in range(3)}, ("layers.3.mlp", 20): 1}
    found = Recording()
    for module, flops in places:
        found.flops[Phase.FORWARD, module] = flops
        found.traffic[Phase.FORWARD, module] = MemoryTraffic(1, flops, 1)
    return found


@pytest.mark.parametrize(("cycles", "flops"), [(2, 5 + 10 + 20), (3, 5 + 20 + 20), (4, 5 + 30 + 20), (9, 5 + 80 + 20)])
def test_the_middle_layer_counts_as_often_as_the_model_has_it(cycles: int, flops: int) -> None:
    work = StepTimes(recording(), [CYCLES], None, "bfloat16").work_by_phase([cycles])[Phase.FORWARD]
    assert (work.flops, work.other_bytes, work.operators) == (flops, flops, cycles + 1)
    assert work.seconds == 0.0


@given(st.integers(4, 40))
def test_the_pace_of_a_run_is_that_of_the_composed_recording(cycles: int) -> None:
    run = Run(tuple((f"layers.{index}",) for index in range(cycles)))
    short = recording()
    named = Recording(
        flops={(phase, module.replace("layers.3", run.cycles[-1][0])): n for (phase, module), n in short.flops.items()},
        traffic={
            (phase, module.replace("layers.3", run.cycles[-1][0])): n for (phase, module), n in short.traffic.items()
        },
    )
    full = StepTimes(compose(named, run), (), RATES, "bfloat16").work_by_phase(())[Phase.FORWARD]
    quick = StepTimes(short, [CYCLES], RATES, "bfloat16").work_by_phase([cycles])[Phase.FORWARD]
    assert quick.seconds == pytest.approx(full.seconds)
    assert quick.flops == full.flops


def test_a_step_bears_its_share_of_the_switch() -> None:
    by_phase = {Phase.FORWARD: 1.0, Phase.BACKWARD: 2.0, Phase.SWITCH: 10.0}
    assert step_seconds(by_phase, 50) == pytest.approx(3.2)
    assert step_seconds(by_phase, 0) == 3.0


def test_blocks_count_alike_in_the_mean() -> None:
    blocks = [
        {Phase.FORWARD: Work(seconds=1.0)},
        {Phase.FORWARD: Work(seconds=3.0), Phase.STEP: Work(seconds=2.0)},
    ]
    means = mean_work(blocks)
    assert (means[Phase.FORWARD].seconds, means[Phase.STEP].seconds) == (2.0, 1.0)

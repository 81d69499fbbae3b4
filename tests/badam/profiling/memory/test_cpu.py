"""Measured CPU memory against sums that can be done by hand, and against a walk over everything that is alive."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from badam.errors import BadamError
from badam.profiling.memory.cpu import CpuMemory
from badam.profiling.memory.cpu_allocator_log import AllocatorLog, Unreported
from badam.profiling.memory.states import ModelStates, live_cpu_tensors
from badam.vocabulary import Category, Phase

SIDE = 64
MATRIX = SIDE * SIDE * 4


@pytest.fixture
def memory() -> Iterator[CpuMemory]:
    source = CpuMemory()
    source.start()
    yield source
    source.stop()


def model_and_optimizer() -> tuple[nn.Linear, torch.optim.Optimizer]:
    model = nn.Linear(SIDE, SIDE, bias=False)
    return model, torch.optim.AdamW(model.parameters(), fused=True)


def bytes_of_live_tensors() -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in live_cpu_tensors()}
    return sum(storages.values())


def step(memory: CpuMemory, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    memory.phase_begins(Phase.FORWARD)
    loss = model(torch.randn(8, SIDE)).sum()
    memory.phase_begins(Phase.BACKWARD)
    loss.backward()
    del loss
    memory.phase_begins(Phase.STEP)
    optimizer.step()
    optimizer.zero_grad()
    memory.phase_begins(Phase.SETUP)


def test_live_bytes_equal_a_walk_over_everything_alive(memory: CpuMemory) -> None:
    """The sum of the allocator's reports and the tensors that the garbage collector knows are found independently."""
    model, optimizer = model_and_optimizer()
    memory.attach(ModelStates(model, optimizer))
    for _ in range(3):
        step(memory, model, optimizer)
        memory.end_step(pause=False)
        gc.collect()
        assert memory.live_bytes == bytes_of_live_tensors()


def test_the_peak_is_split_into_what_each_byte_is_for(memory: CpuMemory) -> None:
    before = memory.live_bytes
    model, optimizer = model_and_optimizer()
    memory.attach(ModelStates(model, optimizer))
    for _ in range(2):
        step(memory, model, optimizer)
        result = memory.end_step(pause=False)
    assert result.by_category[Category.PARAMETER] == MATRIX
    assert result.by_category[Category.GRADIENT] == MATRIX
    assert result.by_category[Category.OPTIMIZER_STATE] == 2 * MATRIX + 4
    rest = result.by_category[Category.ACTIVATION] - before
    assert 0 < rest < MATRIX
    assert sum(result.by_category.values()) == result.peak_bytes


def test_a_peak_belongs_to_the_phase_that_made_it(memory: CpuMemory) -> None:
    model, optimizer = model_and_optimizer()
    memory.attach(ModelStates(model, optimizer))
    memory.phase_begins(Phase.FORWARD)
    floor = memory.live_bytes
    torch.empty(1000, dtype=torch.uint8)
    memory.phase_begins(Phase.LOSS)
    torch.empty(5000, dtype=torch.uint8)
    memory.phase_begins(Phase.BACKWARD)
    torch.empty(3000, dtype=torch.uint8)
    peaks = memory.end_step(pause=False).peak_by_phase
    assert {phase: peak - floor for phase, peak in peaks.items()} == {
        Phase.SETUP: 0,
        Phase.FORWARD: 1000,
        Phase.LOSS: 5000,
        Phase.BACKWARD: 3000,
    }


def test_what_was_alive_before_counts_until_it_dies() -> None:
    early = torch.empty(1 << 20, dtype=torch.uint8)
    memory = CpuMemory()
    memory.start()
    try:
        model, optimizer = model_and_optimizer()
        memory.attach(ModelStates(model, optimizer))
        with_early = memory.live_bytes
        memory.phase_begins(Phase.FORWARD)
        del early
        memory.phase_begins(Phase.BACKWARD)
        result = memory.end_step(pause=False)
    finally:
        memory.stop()
    assert memory.live_bytes == with_early - (1 << 20)
    assert result.peak_by_phase[Phase.FORWARD] == with_early
    assert result.peak_by_phase[Phase.BACKWARD] == with_early - (1 << 20)


def test_parameters_mapped_from_a_file_count(memory: CpuMemory, tmp_path: object) -> None:
    model, optimizer = model_and_optimizer()
    path = f"{tmp_path}/weights"
    mapped = torch.from_file(path, shared=True, size=SIDE * SIDE)
    model.weight.data = mapped
    before = memory.live_bytes
    memory.attach(ModelStates(model, optimizer))
    memory.phase_begins(Phase.FORWARD)
    assert memory.end_step(pause=False).by_category[Category.PARAMETER] == MATRIX
    assert memory.live_bytes == before + MATRIX


def test_a_second_profiler_in_the_thread_is_refused_in_a_sentence(memory: CpuMemory) -> None:
    with pytest.raises(BadamError, match="already running"):
        CpuMemory().start()


def test_nothing_is_lost_between_two_readings() -> None:
    log = AllocatorLog()
    log.start()
    kept = torch.empty(100, dtype=torch.uint8)
    first = log.drain()
    del kept
    second = log.stop()
    assert [nbytes for _, nbytes in first] == [100]
    assert [nbytes for _, nbytes in second] == [-100]
    assert second[0][0] == first[0][0]


def test_what_was_not_reported_stands_in_its_place_in_time() -> None:
    log = AllocatorLog()
    log.start()
    kept = [torch.empty(100, dtype=torch.uint8)]
    death = Unreported(time.time_ns(), (1, -7))
    time.sleep(0.001)
    kept.append(torch.empty(200, dtype=torch.uint8))
    late = Unreported(time.time_ns() + 10**9, (2, -8))
    early = Unreported(0, (3, -9))
    assert [nbytes for _, nbytes in log.stop([late, death, early])] == [-9, 100, -7, 200, -8]


def test_reading_inside_an_open_range_is_safe() -> None:
    """torch opens one around each optimizer step; a profiler that had recorded its beginning would crash at its end."""
    log = AllocatorLog()
    log.start()
    for _ in range(50):
        with torch.profiler.record_function("outer"):
            kept = torch.empty(100, dtype=torch.uint8)
            with torch.profiler.record_function("inner"):
                log.drain()
            torch.empty(10, dtype=torch.uint8)
        log.drain()
    del kept
    log.stop()


@given(st.lists(st.one_of(st.none(), st.integers(1, 10_000), st.just(8191)), max_size=30))
@settings(max_examples=40, deadline=None)
def test_marks_stand_between_the_allocations_that_they_were_set_between(script: list[int | None]) -> None:
    log = AllocatorLog()
    log.start()
    kept, expected, marks = [], [], 0
    for nbytes in script:
        if nbytes is None:
            log.mark(marks)
            expected.append((marks, 0))
            marks += 1
        else:
            kept.append(torch.empty(nbytes, dtype=torch.uint8))
            expected.append((kept[-1].data_ptr(), nbytes))
    found = [(address, nbytes) for address, nbytes in log.stop() if nbytes >= 0]
    assert found == expected


def test_a_step_measured_after_a_pause_is_measured_as_without_one() -> None:
    """In the pause everything is replaced: moments, a new optimizer state, gradients."""
    peaks = []
    for pause in (False, True):
        memory = CpuMemory()
        memory.start()
        try:
            torch.manual_seed(0)
            model, optimizer = model_and_optimizer()
            memory.attach(ModelStates(model, optimizer))
            base = memory.live_bytes
            step(memory, model, optimizer)
            memory.end_step(pause=pause)
            optimizer.state.clear()
            for _ in range(2):
                model(torch.randn(8, SIDE)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            if not pause:
                memory.end_step(pause=False)
            memory.begin_step([])
            step(memory, model, optimizer)
            result = memory.end_step(pause=pause)
            peaks.append({phase: peak - base for phase, peak in result.peak_by_phase.items()})
            assert result.by_category[Category.OPTIMIZER_STATE] == 2 * MATRIX + 4
        finally:
            memory.stop()
        del model, optimizer
        gc.collect()
    assert peaks[0] == peaks[1]


def test_what_is_made_in_a_pause_and_released_in_a_measured_step_is_not_counted_for_ever() -> None:
    memory = CpuMemory()
    memory.start()
    try:
        model, optimizer = model_and_optimizer()
        memory.attach(ModelStates(model, optimizer))
        memory.phase_begins(Phase.FORWARD)
        memory.end_step(pause=True)
        without_moments = memory.live_bytes
        model(torch.randn(8, SIDE)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        memory.begin_step([])
        assert memory.live_bytes == without_moments + 2 * MATRIX + 4
        memory.phase_begins(Phase.SWITCH)
        optimizer.state.clear()
        memory.end_step(pause=True)
        assert memory.live_bytes == without_moments
    finally:
        memory.stop()


@pytest.mark.parametrize("pause", [False, True])
def test_weights_that_are_mapped_from_a_file_are_counted_once(tmp_path: Path, memory: CpuMemory, pause: bool) -> None:
    """The file is one block of memory with all parameters in it, and is there as long as one of them is."""
    save_file({name: torch.zeros(SIDE, SIDE) for name in ("first", "second")}, tmp_path / "weights.safetensors")
    file = (tmp_path / "weights.safetensors").stat().st_size
    before = memory.live_bytes
    model = nn.Module()
    for name, tensor in load_file(tmp_path / "weights.safetensors").items():
        model.register_parameter(name, nn.Parameter(tensor))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory.attach(ModelStates(model, optimizer))
    for _ in range(2):
        memory.begin_step([])
        memory.phase_begins(Phase.STEP)
        found = memory.end_step(pause=pause)
        assert memory.live_bytes - before == file
        assert found.by_category[Category.PARAMETER] == file
    del model, optimizer
    memory.stop()


def test_a_mapped_file_is_gone_with_its_last_parameter(tmp_path: Path, memory: CpuMemory) -> None:
    save_file({"weight": torch.zeros(SIDE, SIDE)}, tmp_path / "weights.safetensors")
    before = memory.live_bytes
    model = nn.Linear(SIDE, SIDE, bias=False)
    model.weight.data = load_file(tmp_path / "weights.safetensors")["weight"]
    memory.attach(ModelStates(model, torch.optim.SGD(model.parameters(), lr=0.1)))
    model.weight.data = torch.zeros(1)
    memory.end_step(pause=False)
    assert memory.live_bytes - before == 4

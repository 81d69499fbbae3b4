"""The CUDA source against a card that is played: what torch and NVML would answer, in order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from badam.profiling.clocks import CudaClock
from badam.profiling.memory import cuda as cuda_memory
from badam.profiling.memory.cuda import CudaMemory
from badam.profiling.memory.states import ModelStates
from badam.vocabulary import Category, Phase

PARAMETERS = 32 * 32 * 4


class Gpu:
    """torch's statistics and the driver's, set by the test."""

    def __init__(self) -> None:
        self.peak = 0
        self.live = 0
        self.reserved = 0
        self.used = 0
        self.resets = 0

    def statistics(self) -> dict[str, Any]:
        return {
            "allocated_bytes": {"all": {"peak": self.peak, "current": self.live}},
            "reserved_bytes": {"all": {"peak": self.reserved}},
        }

    def reset(self) -> None:
        self.resets += 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    played = Gpu()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", played.statistics)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", played.reset)
    meter = SimpleNamespace(description="played", used_bytes=lambda: played.used, close=lambda: None)
    monkeypatch.setattr(cuda_memory, "DeviceMeter", lambda _: meter)
    return played


def attached(gpu: Gpu) -> tuple[CudaMemory, nn.Linear]:
    model = nn.Linear(32, 32, bias=False)
    memory = CudaMemory()
    memory.start()
    memory.attach(ModelStates(model, torch.optim.SGD(model.parameters(), lr=0.1)))
    return memory, model


def test_each_phase_has_its_own_peak(gpu: Gpu) -> None:
    memory, _ = attached(gpu)
    for phase, peak in ((Phase.FORWARD, 1000), (Phase.BACKWARD, 20_000), (Phase.STEP, 60_000), (Phase.SETUP, 9000)):
        gpu.peak, gpu.reserved, gpu.used = peak, 2 * peak, 3 * peak
        memory.phase_begins(phase)
    result = memory.end_step(pause=False)
    assert result.peak_by_phase == {
        Phase.SETUP: 1000,
        Phase.FORWARD: 20_000,
        Phase.BACKWARD: 60_000,
        Phase.STEP: 9000,
    }
    assert result.reserved_bytes == 120_000
    assert result.device_bytes == 27_000
    assert gpu.resets == 6  # start, attach and each change of phase


def test_the_split_of_the_peak_sums_to_it_and_holds_what_existed_when_its_phase_began(gpu: Gpu) -> None:
    memory, model = attached(gpu)
    gpu.peak = 5000
    memory.phase_begins(Phase.BACKWARD)
    model(torch.ones(1, 32)).sum().backward()
    memory.phase_begins(Phase.STEP)
    gpu.peak = 50_000
    memory.phase_begins(Phase.SETUP)
    result = memory.end_step(pause=False)
    assert result.by_category == {
        Category.PARAMETER: PARAMETERS,
        Category.GRADIENT: PARAMETERS,
        Category.ACTIVATION: 50_000 - 2 * PARAMETERS,
    }


def test_a_split_that_cannot_be_right_is_not_given(gpu: Gpu) -> None:
    memory, _ = attached(gpu)
    gpu.peak = PARAMETERS - 1
    memory.phase_begins(Phase.SETUP)
    assert memory.end_step(pause=False).by_category == {Category.ACTIVATION: PARAMETERS - 1}


def process(pid: int, used: int | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=used)


class Driver:
    """The functions of pynvml that are called."""

    class NVMLError(Exception):
        pass

    def __init__(self, processes: list[Any], used: int, *, absent: bool = False) -> None:
        self._processes = processes
        self._used = used
        self._absent = absent
        self.closed = False
        self.has_context = False  # of the process that asks: the driver lists it from then on

    def nvmlInit(self) -> None:  # noqa: N802 - the library's name
        if self._absent:
            raise self.NVMLError("no driver")

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.closed = True

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        assert uuid == "GPU-1234"
        return "handle"

    def nvmlDeviceGetComputeRunningProcesses(self, _: str) -> list[Any]:  # noqa: N802
        return self._processes if self.has_context else []

    def make_context(self, index: int) -> None:
        assert index == 0
        self.has_context = True

    def nvmlDeviceGetMemoryInfo(self, _: str) -> Any:  # noqa: N802
        return SimpleNamespace(used=self._used)


@pytest.mark.parametrize(
    ("driver", "used", "words"),
    [
        (
            Driver([SimpleNamespace(pid=1, usedGpuMemory=5), SimpleNamespace(pid=77, usedGpuMemory=7)], 100),
            7,
            "process",
        ),
        (Driver([SimpleNamespace(pid=1, usedGpuMemory=5)], 100), 100, "whole card"),
        (Driver([SimpleNamespace(pid=77, usedGpuMemory=None)], 100), 100, "whole card"),
        (Driver([], 100, absent=True), None, "no NVML"),
    ],
    ids=["own-process", "hidden-process", "untold", "no-driver"],
)
def test_the_driver_tells_this_process_or_the_card_or_nothing(
    monkeypatch: pytest.MonkeyPatch, driver: Driver, used: int | None, words: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", driver)
    monkeypatch.setattr(cuda_memory.os, "getpid", lambda: 77)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1234"))
    monkeypatch.setattr(torch.cuda, "synchronize", driver.make_context)
    meter = cuda_memory.DeviceMeter(0)
    assert meter.used_bytes() == used
    assert words in meter.description
    meter.close()
    assert driver.closed is (used is not None)


class Event:
    """A CUDA event that was recorded at a second of the test's choosing, and passed when the test says so."""

    now = 0.0
    passed = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now

    def query(self) -> bool:
        return self.at <= Event.passed

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


def test_seconds_of_a_step_are_told_once_the_gpu_has_passed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(Event, "passed", 1e9))
    Event.now, Event.passed = 0.0, 0.0
    clock = CudaClock()
    for second, phase in ((1, Phase.FORWARD), (3, Phase.BACKWARD), (6, Phase.RECOMPUTE), (7, Phase.BACKWARD)):
        Event.now = second
        clock.phase_begins(phase)
    Event.now = 10
    clock.phase_begins(Phase.SETUP)
    clock.end_step()
    Event.now = 12
    clock.resume()
    assert clock.finished() == []
    Event.passed = 10
    assert clock.finished() == [{Phase.SETUP: 1, Phase.FORWARD: 2, Phase.BACKWARD: 6, Phase.RECOMPUTE: 1}]
    Event.now = 13
    clock.phase_begins(Phase.FORWARD)
    clock.end_step()
    assert clock.finished() == []
    assert clock.finished(wait=True) == [{Phase.SETUP: 1}]

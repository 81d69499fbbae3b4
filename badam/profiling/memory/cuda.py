"""Allocated, reserved and device bytes on an NVIDIA GPU: torch's memory statistics by phase, NVML per step.

torch's allocator does its accounts on the host when memory is asked for, so a phase's peak is exact without waiting
for the GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from badam.profiling.memory.source import Boundary, StepMemory
from badam.profiling.memory.states import ModelStates, distinct_bytes
from badam.vocabulary import Category, Phase


class DeviceMeter:
    """Asks NVML what this process uses on one card; where the driver does not tell by process, what the card uses.

    Args:
        index: torch's index of the CUDA device.
    """

    def __init__(self, index: int) -> None:
        self._nvml, self._handle = _open(index)
        self.description = "NVML, this process"
        if self._handle is None:
            self.description = "no NVML"
            return
        torch.cuda.synchronize(index)  # the driver lists a process from when it has a context, which this makes
        if self._process_bytes() is None:
            self.description = "NVML, whole card (the driver does not tell processes apart here)"

    def used_bytes(self) -> int | None:
        """Bytes in use now, or None without NVML."""
        if self._handle is None:
            return None
        own = self._process_bytes()
        return own if own is not None else int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def close(self) -> None:
        """Let go of the driver library."""
        if self._handle is not None:
            self._nvml.nvmlShutdown()
            self._handle = None

    def _process_bytes(self) -> int | None:
        for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle):
            if process.pid == os.getpid() and process.usedGpuMemory:
                return int(process.usedGpuMemory)
        return None


def _open(index: int) -> tuple[Any, Any]:
    """The library and the card's handle, by the card's UUID, since CUDA_VISIBLE_DEVICES renumbers torch's indices."""
    try:
        import pynvml
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError:  # no driver library, no driver, or a card that hides itself
        return None, None


class CudaMemory:
    """Measures the current CUDA device; a badam.profiling.memory.source.MemorySource.

    At the peak, PARAMETER, MASTER and OPTIMIZER_STATE are what the run held when the step began, and GRADIENT what it
    held when the phase of the peak began; a gradient that came into being within that phase counts as ACTIVATION.
    """

    costly = False

    def __init__(self) -> None:
        self._meter = DeviceMeter(torch.cuda.current_device())
        self._states: ModelStates | None = None
        self._phase = Phase.SETUP
        self._peaks: dict[Phase, int] = {}
        self._peak_gradient_bytes = 0
        self._gradient_bytes = 0
        self._held: dict[Category, int] = {}
        self._reserved_bytes = 0
        self._boundaries: list[Boundary] = []
        self._since_boundary = 0
        self.description = f"torch.cuda memory statistics by phase; {self._meter.description}"

    @property
    def live_bytes(self) -> int:
        """Bytes allocated now."""
        return int(torch.cuda.memory_allocated())

    def start(self) -> None:
        """Forget the peaks of what ran before."""
        torch.cuda.reset_peak_memory_stats()

    def attach(self, states: ModelStates) -> None:
        """Learn the model and its optimizer."""
        self._states = states
        self._held = _held(states)
        self.start()

    def begin_step(self, batch: Iterable[Tensor]) -> None:
        """Every step is measured."""

    def phase_begins(self, phase: Phase) -> None:
        """Book the peak of the phase that ends."""
        self._book_peak()
        self._phase = phase
        # Between the layers of a checkpointed backward the gradients are not worth counting: none of a layer exists
        # while it is recomputed, and the peak within backward comes before most of them.
        if phase is not Phase.RECOMPUTE and self._states is not None:
            self._gradient_bytes = distinct_bytes(self._states.gradients()).get(Category.GRADIENT, 0)

    def boundary(self) -> None:
        """Note what is allocated, and the peak since the last boundary."""
        live_bytes = self._book_peak()
        self._boundaries.append(Boundary(live_bytes, self._since_boundary))
        self._since_boundary = 0

    def end_step(self, *, pause: bool) -> StepMemory:
        """The peaks since the previous step's end."""
        peaks, self._peaks = self._peaks, {}
        known = {**self._held, Category.GRADIENT: self._peak_gradient_bytes}
        rest = max(peaks.values()) - sum(known.values())
        by_category = {category: size for category, size in {**known, Category.ACTIVATION: rest}.items() if size > 0}
        if rest < 0:  # the known tensors were not all alive at the peak: then the split is not known
            by_category = {Category.ACTIVATION: max(peaks.values())}
        reserved, self._reserved_bytes = self._reserved_bytes, 0
        self._held = _held(self._states) if self._states else {}
        boundaries, self._boundaries = tuple(self._boundaries), []
        self._since_boundary = 0
        return StepMemory(peaks, by_category, reserved, self._meter.used_bytes(), boundaries)

    def stop(self) -> None:
        """Let go of the driver."""
        self._meter.close()

    def _book_peak(self) -> int:
        """Book the peak since the last call on the current phase, and begin a new one; the bytes allocated now."""
        statistics = torch.cuda.memory_stats_as_nested_dict()
        peak, live = (int(statistics["allocated_bytes"]["all"][kind]) for kind in ("peak", "current"))
        if peak > max(self._peaks.values(), default=0):
            self._peak_gradient_bytes = self._gradient_bytes
        self._peaks[self._phase] = max(self._peaks.get(self._phase, 0), peak)
        self._since_boundary = max(self._since_boundary, peak)
        self._reserved_bytes = max(self._reserved_bytes, statistics["reserved_bytes"]["all"]["peak"])
        torch.cuda.reset_peak_memory_stats()
        return live


def _held(states: ModelStates) -> dict[Category, int]:
    return distinct_bytes((*states.parameters(), *states.optimizer_states()))

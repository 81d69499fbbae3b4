"""Reads a CUDA device's memory; behind one small interface, so that what uses it also runs where there is none."""

from __future__ import annotations

import gc
from typing import Protocol

import torch

from badam.profiling.memory.cuda import DeviceMeter
from benchmarks.gpu.record import DeviceAccount


class Meter(Protocol):
    """Bytes on one device, now and at the peak since the last reset."""

    def allocated(self) -> int:
        """In tensors."""

    def peak(self) -> int:
        """Highest in tensors since :meth:`reset_peak`."""

    def reserved(self) -> int:
        """Held by torch's allocator."""

    def used(self) -> int:
        """On the device by all processes, as CUDA tells; without the driver's own share."""

    def nvml(self) -> int | None:
        """As NVML tells, of this process if it can; see :attr:`nvml_source`."""

    def reset_peak(self) -> None:
        """Forget the peak."""

    def settle(self) -> None:
        """Wait for the device and give the allocator's cache back."""

    nvml_source: str


class CudaMeter:
    """The current CUDA device."""

    def __init__(self) -> None:
        self._nvml = DeviceMeter(torch.cuda.current_device())
        self.nvml_source = self._nvml.description

    def allocated(self) -> int:
        """In tensors."""
        return int(torch.cuda.memory_allocated())

    def peak(self) -> int:
        """Highest in tensors since :meth:`reset_peak`."""
        return int(torch.cuda.max_memory_allocated())

    def reserved(self) -> int:
        """Held by torch's allocator."""
        return int(torch.cuda.memory_reserved())

    def used(self) -> int:
        """Total less free."""
        free, total = torch.cuda.mem_get_info()
        return int(total - free)

    def nvml(self) -> int | None:
        """As NVML tells."""
        return self._nvml.used_bytes()

    def reset_peak(self) -> None:
        """Forget the peak."""
        torch.cuda.reset_peak_memory_stats()

    def settle(self) -> None:
        """Wait for the device and give the allocator's cache back."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def account(meter: Meter) -> DeviceAccount:
    """Where the device's memory is now."""
    return DeviceAccount(
        allocated_bytes=meter.allocated(),
        reserved_bytes=meter.reserved(),
        nvml_bytes=meter.nvml(),
        nvml_source=meter.nvml_source,
        cuda_used_bytes=meter.used(),
    )

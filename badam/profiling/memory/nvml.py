"""Bytes in use on the card as the driver sees them: torch's memory and everything outside it, such as the context."""

from __future__ import annotations

import os
from typing import Any

import torch


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

"""Simulated allocators in a known state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from badam_planner.recording.caching_allocator import SimulatedAllocator

AllocatorT = TypeVar("AllocatorT", bound=SimulatedAllocator[Any, Any])


def allocator_after(kind: type[AllocatorT], *sizes: int, capacity: int | None = None) -> AllocatorT:
    """An allocator that holds ``sizes`` under the handles 0, 1, 2, …"""
    allocator = kind(capacity)
    for handle, size in enumerate(sizes):
        allocator.allocate(handle, size)
    return allocator


def peaks_of_a_repeated_step(allocator: SimulatedAllocator[Any, Any], sizes: Sequence[int]) -> list[int]:
    """Highest reserved bytes after each of two rounds in which ``sizes`` are allocated and then released."""
    peaks = []
    for _ in range(2):
        for handle, size in enumerate(sizes):
            allocator.allocate(handle, size)
        for handle in range(len(sizes)):
            allocator.release(handle)
        peaks.append(allocator.peak_reserved)
    return peaks

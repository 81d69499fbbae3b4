"""Simulated allocators in a known state."""

from __future__ import annotations

from typing import Any, TypeVar

from badam_planner.allocator import SimulatedAllocator

AllocatorT = TypeVar("AllocatorT", bound=SimulatedAllocator[Any, Any])


def allocator_after(kind: type[AllocatorT], *sizes: int, capacity: int | None = None) -> AllocatorT:
    """An allocator that holds ``sizes`` under the handles 0, 1, 2, …"""
    allocator = kind(capacity)
    for handle, size in enumerate(sizes):
        allocator.allocate(handle, size)
    return allocator

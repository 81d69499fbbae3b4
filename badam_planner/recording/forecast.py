"""From one recording and one card to the numbers that a plan shows for a block. Pure, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from badam.plan import Target
from badam.vocabulary import Category, Phase
from badam_planner.recording.caching_allocator import ROUNDING, CachingAllocator, SimulatedAllocator
from badam_planner.recording.expandable_allocator import ExpandableAllocator
from badam_planner.recording.recording import GIVEN, NEVER, Allocation, Recording, TensorRole
from badam_planner.recording.timeline import Peak, Timeline


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is predicted while one block is active. Bytes."""

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_device_bytes: int
    peak_phase: Phase
    peak_module: str
    by_category: dict[Category, int]  # at the peak; sums to peak_allocated_bytes
    by_phase: dict[Phase, int]  # highest allocated bytes within each phase
    largest: tuple[tuple[str, int], ...]  # the largest live tensors at the peak, by name


def forecast(recording: Recording, target: Target, *, head_module: str, largest: int = 10) -> Forecast:
    """Predict a block's peaks on ``target`` from its rehearsal; see :class:`Forecaster`."""
    return Forecaster(recording, target, head_module=head_module).forecast(target, largest=largest)


class Forecaster:
    """Forecasts of a recording; what does not depend on bytes is found once.

    Formula: allocated = bytes of the caching allocator's blocks that are taken, one of them by the workspace of matrix
    multiplication; reserved = bytes of its segments; device = reserved + context +
    communication library. On the CPU there is no caching allocator: all three are the live bytes.
    Not counted: other processes on the card, memory-mapped weights on the host.
    """

    def __init__(self, recording: Recording, target: Target, *, head_module: str) -> None:
        """Read a recording at full depth.

        Args:
            recording: of a rehearsal.
            target: a card, whose workspace counts, or the CPU.
            head_module: path of the output projection.
        """
        self._on_gpu = target.gpu != "cpu"
        self._workspace_bytes = target.workspace_bytes if self._on_gpu else 0
        if self._on_gpu:
            recording = with_workspace(recording, self._workspace_bytes)
        self._tensors = Timeline(
            recording, head_module, granularity=ROUNDING if self._on_gpu else 1, on_gpu=self._on_gpu
        )

    def forecast(self, target: Target, numbers: Sequence[int] | None = None, *, largest: int = 10) -> Forecast:
        """Predict the block's peaks.

        Args:
            target: gives the bytes outside torch and the kind of segments; otherwise like the forecaster's own.
            numbers: of a size, if the recording is the pattern of a family; its bytes otherwise.
            largest: how many of the live tensors at the peak to name.
        """
        tensors = self._tensors if numbers is None else self._tensors.resized(self._sizes(numbers))
        by_phase, reserved = _on_a_gpu(tensors, target) if self._on_gpu else (tensors.peak_by_phase(), None)
        peak = max(by_phase.values(), key=lambda at: at.nbytes)
        reserved = peak.nbytes if reserved is None else reserved
        alive = tensors.live_at(peak.tick)
        categories: dict[Category, int] = {}
        for _, category, size in alive:
            categories[category] = categories.get(category, 0) + size
        if rest := peak.nbytes - sum(categories.values()):
            categories[Category.CACHE] = rest  # ends of blocks that are too small to be split off
        return Forecast(
            peak_allocated_bytes=peak.nbytes,
            peak_reserved_bytes=reserved,
            peak_device_bytes=reserved + target.outside_bytes,
            peak_phase=peak.phase,
            peak_module=peak.module,
            by_category=categories,
            by_phase={phase: at.nbytes for phase, at in by_phase.items()},
            largest=tuple((allocation.describe(), nbytes) for allocation, _, nbytes in alive[:largest]),
        )

    def _sizes(self, numbers: Sequence[int]) -> list[int]:
        """Rounded bytes by allocation; those of the workspace, which come last, are the same at every size."""
        granularity = self._tensors.granularity
        rounded = [-(-number // granularity) * granularity for number in numbers]
        allocations = self._tensors.recording.allocations
        tensors = allocations[:-1] if self._workspace_bytes else allocations
        sizes = [0 if one.gpu_only and not self._on_gpu else rounded[one.size_law] for one in tensors]
        for index, one in enumerate(tensors):
            if one.grown:
                sizes[index] = -(-(numbers[one.size_law] + one.grown) // granularity) * granularity
        return [*sizes, self._tensors.sizes[-1]] if self._workspace_bytes else sizes


def _on_a_gpu(tensors: Timeline, target: Target) -> tuple[dict[Phase, Peak], int | None]:
    """The peaks of the allocator's blocks by phase, and the bytes of its segments."""
    allocator, sizes = replay(tensors, expandable_segments=target.expandable_segments)
    return tensors.resized(sizes).peak_by_phase(), allocator.peak_reserved


def with_workspace(recording: Recording, nbytes: int) -> Recording:
    """The recording with the workspace, which the first matrix product of the first forward takes for good."""
    first_forward = next((tick for tick, phase in recording.phase_starts if phase is Phase.FORWARD), 0)
    workspace = Allocation(
        nbytes=nbytes,
        born=first_forward,
        died=NEVER,
        phase=Phase.FORWARD,
        module="",
        operation=GIVEN,
        shape=(nbytes,),
        dtype="uint8",
        category=Category.WORKSPACE,
        role=TensorRole.MATMUL_WORKSPACE,
    )
    return replace(recording, allocations=[*recording.allocations, workspace]) if nbytes else recording


def replay(
    timeline: Timeline, capacity: int | None = None, *, expandable_segments: bool = False
) -> tuple[SimulatedAllocator[Any, Any], list[int]]:
    """Run a timeline through the simulated allocator, or through the one with expandable segments.

    Returns:
        The allocator after the last event, and the bytes of the block that each allocation got.

    Raises:
        AllocationRefused: if ``capacity`` bytes of segments are not enough.
    """
    allocator: SimulatedAllocator[Any, Any]
    allocator = ExpandableAllocator(capacity) if expandable_segments else CachingAllocator(capacity)
    sizes = [0] * len(timeline.sizes)
    for _, change, index in timeline.events():
        if change >= 0:
            sizes[index] = allocator.allocate(index, change)
        else:
            allocator.release(index)
    return allocator, sizes

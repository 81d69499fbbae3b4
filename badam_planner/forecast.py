"""From one recording and one card to the numbers that a plan shows for a block. Pure, no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from badam.plan import Target
from badam.vocabulary import Category, Phase
from badam_planner.allocator import ROUNDING, CachingAllocator
from badam_planner.events import GIVEN, NEVER, Allocation, Recording
from badam_planner.expandable import ExpandableAllocator
from badam_planner.timeline import Timeline


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
    """Predict a block's peaks on ``target`` from its rehearsal.

    Formula: allocated = bytes of the caching allocator's blocks that are taken, one of them by the workspace of matrix
    multiplication; reserved = bytes of its segments; device = reserved + context. On the CPU there is no caching
    allocator: all three are the live bytes.
    Not counted: other processes on the card, memory-mapped weights on the host.
    """
    if target.gpu == "cpu":
        tensors = blocks = Timeline(recording, head_module)
        reserved = tensors.peak().nbytes
    else:
        recording = with_workspace(recording, target.workspace_bytes)
        tensors = Timeline(recording, head_module, granularity=ROUNDING, on_card=True)
        allocator, sizes = replay(tensors, expandable_segments=target.expandable_segments)
        blocks = tensors.resized(sizes)
        reserved = allocator.peak_reserved
    by_phase = blocks.peak_by_phase()
    peak = max(by_phase.values(), key=lambda at: at.nbytes)
    alive = tensors.live_at(peak.tick)
    categories = tensors.by_category(peak.tick)
    if rest := peak.nbytes - sum(categories.values()):
        categories[Category.CACHE] = rest  # ends of blocks that are too small to be split off
    return Forecast(
        peak_allocated_bytes=peak.nbytes,
        peak_reserved_bytes=reserved,
        peak_device_bytes=reserved + target.context_bytes,
        peak_phase=peak.phase,
        peak_module=peak.module,
        by_category=categories,
        by_phase={phase: at.nbytes for phase, at in by_phase.items()},
        largest=tuple((allocation.describe(), nbytes) for allocation, _, nbytes in alive[:largest]),
    )


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
        label="workspace of matrix multiplication",
    )
    return replace(recording, allocations=[*recording.allocations, workspace]) if nbytes else recording


def replay(
    timeline: Timeline, capacity: int | None = None, *, expandable_segments: bool = False
) -> tuple[CachingAllocator | ExpandableAllocator, list[int]]:
    """Run a timeline through the simulated allocator, or through the one with expandable segments.

    Returns:
        The allocator after the last event, and the bytes of the block that each allocation got.

    Raises:
        AllocationRefused: if ``capacity`` bytes of segments are not enough.
    """
    allocator = ExpandableAllocator(capacity) if expandable_segments else CachingAllocator(capacity)
    sizes = [0] * len(timeline.sizes)
    for _, change, index in timeline.events():
        if change >= 0:
            sizes[index] = allocator.allocate(index, change)
        else:
            allocator.release(index)
    return allocator, sizes

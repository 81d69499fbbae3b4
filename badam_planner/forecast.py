"""From one recording and one card to the numbers that a plan shows for a block. Pure, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from badam.plan import Target
from badam.vocabulary import Category, Phase
from badam_planner.allocator import ROUNDING, CachingAllocator
from badam_planner.events import Recording
from badam_planner.timeline import Timeline

WORKSPACE_HANDLE = -1


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

    Formula: allocated = live bytes in the allocator's blocks + matrix-multiplication workspace; reserved = what the
    caching allocator holds in segments; device = reserved + context. On the CPU there is no caching allocator: all
    three are the live bytes.
    Not counted: other processes on the card, memory-mapped weights on the host.
    """
    if target.gpu == "cpu":
        timeline = Timeline(recording, head_module)
        return _summary(timeline, target, None, largest)
    timeline = Timeline(recording, head_module, granularity=ROUNDING, on_card=True)
    allocator = replay(timeline, target.workspace_bytes)
    return _summary(timeline, target, allocator, largest)


def replay(timeline: Timeline, workspace_bytes: int, capacity: int | None = None) -> CachingAllocator:
    """Run a recording through the simulated allocator.

    The workspace is allocated when the first forward begins, where the first matrix product asks for it.
    """
    allocator = CachingAllocator(capacity)
    first_forward = next((tick for tick, phase in timeline.recording.phase_starts if phase is Phase.FORWARD), 0)
    waiting = workspace_bytes > 0
    for tick, change, index in timeline.events():
        if waiting and tick >= first_forward:
            allocator.allocate(WORKSPACE_HANDLE, workspace_bytes)
            waiting = False
        if change >= 0:
            allocator.allocate(index, change)
        else:
            allocator.release(index)
    return allocator


def _summary(timeline: Timeline, target: Target, allocator: CachingAllocator | None, largest: int) -> Forecast:
    by_phase = timeline.peak_by_phase()
    peak = max(by_phase.values(), key=lambda at: at.nbytes)
    categories = timeline.by_category(peak.tick)
    workspace = 0 if allocator is None else target.workspace_bytes
    allocated = peak.nbytes + workspace if allocator is None else allocator.peak_allocated
    reserved = allocated if allocator is None else allocator.peak_reserved
    if workspace:
        categories[Category.WORKSPACE] = workspace
    if rest := allocated - sum(categories.values()):
        categories[Category.CACHE] = rest  # ends of blocks too small to be split off
    named = [(item.describe(), nbytes) for item, _, nbytes in timeline.live_at(peak.tick)[:largest]]
    return Forecast(
        peak_allocated_bytes=allocated,
        peak_reserved_bytes=reserved,
        peak_device_bytes=reserved + target.context_bytes,
        peak_phase=peak.phase,
        peak_module=peak.module,
        by_category=categories,
        by_phase={phase: at.nbytes + workspace for phase, at in by_phase.items()},
        largest=tuple(named),
    )

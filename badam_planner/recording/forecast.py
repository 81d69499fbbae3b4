"""From one recording and one device to the numbers that a plan shows for a block. Pure, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from badam.plan import Target
from badam.vocabulary import Category, Phase
from badam_planner.recording.caching_allocator import ROUNDING, AllocationRefused
from badam_planner.recording.recording import Recording, bytes_of
from badam_planner.recording.replay import replay
from badam_planner.recording.timeline import Timeline


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


@dataclass(frozen=True, slots=True)
class VisitsForecast:
    """What is predicted of visits in turns."""

    worst: int  # which of the visits has the highest peak; among equal ones the first
    forecast: Forecast  # while its block is active; what is reserved, over all of the visits


def forecast(recording: Recording, target: Target, *, head_module: str, largest: int = 10) -> Forecast:
    """Predict a block's peaks on ``target`` from its rehearsal, as if no other block were ever visited."""
    return forecast_visits([timeline_on(recording, target, head_module)], target, largest=largest).forecast


def timeline_on(recording: Recording, target: Target, head_module: str) -> Timeline:
    """The timeline of a recording with its sizes as ``target`` counts them.

    Args:
        recording: of a rehearsal, at full depth.
        target: a GPU, whose kernels' scratch counts, or the CPU.
        head_module: path of the output projection.
    """
    on_gpu = target.gpu != "cpu"
    return Timeline(recording, head_module, granularity=ROUNDING if on_gpu else 1, on_gpu=on_gpu)


def forecast_visits(timelines: Sequence[Timeline], target: Target, *, largest: int = 10) -> VisitsForecast:
    """Predict the peaks of visits to blocks of one model, which come in turns.

    Formula: allocated = bytes of the caching allocator's blocks that are taken; reserved = bytes of its segments after
    as many rounds of visits as change anything (:func:`badam_planner.recording.replay.replay`); device = reserved +
    context + communication library. On the CPU there is no caching allocator: all three are the live bytes.
    Not counted: other processes on the GPU, memory-mapped weights on the host.

    Args:
        timelines: of the visits, from :func:`timeline_on`.
        target: gives the bytes outside torch and the kind of segments.
        largest: how many of the live tensors at the peak to name.
    """
    reserved = None
    if target.gpu != "cpu":
        replayed = replay(*timelines, expandable_segments=target.expandable_segments)
        peaks = [visited.by_phase for visited in replayed.visited]
        reserved = replayed.allocator.peak_reserved
    else:
        peaks = [timeline.peak_by_phase() for timeline in timelines]
    highest = [max(by_phase.values(), key=lambda at: at.nbytes) for by_phase in peaks]
    worst = max(range(len(timelines)), key=lambda place: (highest[place].nbytes, -place))
    peak, by_phase = highest[worst], peaks[worst]
    reserved = peak.nbytes if reserved is None else reserved
    alive = [entry for entry in timelines[worst].live_at(peak.tick) if entry[2]]
    categories: dict[Category, int] = {}
    for _, category, size in alive:
        categories[category] = categories.get(category, 0) + size
    if rest := peak.nbytes - sum(categories.values()):
        categories[Category.CACHE] = rest  # ends of blocks that are too small to be split off
    found = Forecast(
        peak_allocated_bytes=peak.nbytes,
        peak_reserved_bytes=reserved,
        peak_device_bytes=reserved + target.outside_bytes,
        peak_phase=peak.phase,
        peak_module=peak.module,
        by_category=categories,
        by_phase={phase: at.nbytes for phase, at in by_phase.items()},
        largest=tuple((allocation.describe(), nbytes) for allocation, _, nbytes in alive[:largest]),
    )
    return VisitsForecast(worst, found)


def cache_releases(timelines: Sequence[Timeline], target: Target) -> float | None:
    """How often per step torch gives back all free segments and tries again, within the memory of ``target``.

    0 where everything fits; None where it would run out of memory even so.
    """
    room = target.usable_bytes - target.outside_bytes
    try:
        replayed = replay(*timelines, capacity=room, expandable_segments=target.expandable_segments)
    except AllocationRefused:
        return None
    return replayed.releases_per_step


def at_size(timeline: Timeline, numbers: Sequence[int]) -> Timeline:
    """The timeline of a family's pattern with the bytes of one size.

    Args:
        timeline: of the pattern.
        numbers: by law.
    """
    granularity, recording = timeline.granularity, timeline.recording
    rounded = [-(-number // granularity) * granularity for number in numbers]
    on_gpu = timeline.on_gpu
    sizes = [0 if one.gpu_only and not on_gpu else rounded[one.size_law] for one in recording.allocations]
    for index, one in enumerate(recording.allocations):
        if (one.grown or one.rule is not None) and (on_gpu or not one.gpu_only):
            nbytes = bytes_of(one, numbers[one.size_law]) + one.grown
            sizes[index] = -(-nbytes // granularity) * granularity
    return timeline.resized(sizes)

"""From one recording and one device to the numbers that a plan shows for a block. Pure, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from badam.plan import Target
from badam.vocabulary import Category, Phase
from badam_planner.recording.caching_allocator import ROUNDING
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


def forecast(recording: Recording, target: Target, *, head_module: str, largest: int = 10) -> Forecast:
    """Predict a block's peaks on ``target`` from its rehearsal; see :class:`Forecaster`."""
    return Forecaster(recording, target, head_module=head_module).forecast(target, largest=largest)


class Forecaster:
    """Forecasts of a recording; what does not depend on bytes is found once.

    Formula: allocated = bytes of the caching allocator's blocks that are taken; reserved = bytes of its segments after
    as many visits as change anything (:func:`badam_planner.recording.replay.replay`); device = reserved + context +
    communication library. On the CPU there is no caching allocator: all three are the live bytes.
    Not counted: other processes on the GPU, memory-mapped weights on the host.
    """

    def __init__(self, recording: Recording, target: Target, *, head_module: str) -> None:
        """Read a recording at full depth.

        Args:
            recording: of a rehearsal.
            target: a GPU or the CPU.
            head_module: path of the output projection.
        """
        self._on_gpu = target.gpu != "cpu"
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
        by_phase, reserved = tensors.peak_by_phase(), None
        if self._on_gpu:
            replayed = replay(tensors, expandable_segments=target.expandable_segments)
            by_phase, reserved = replayed.by_phase, replayed.allocator.peak_reserved
        peak = max(by_phase.values(), key=lambda at: at.nbytes)
        reserved = peak.nbytes if reserved is None else reserved
        alive = [entry for entry in tensors.live_at(peak.tick) if entry[2]]
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
        """Rounded bytes by allocation."""
        granularity = self._tensors.granularity
        rounded = [-(-number // granularity) * granularity for number in numbers]
        allocations = self._tensors.recording.allocations
        sizes = [0 if one.gpu_only and not self._on_gpu else rounded[one.size_law] for one in allocations]
        for index, one in enumerate(allocations):
            if sizes[index] and (one.grown or one.rule is not None):
                nbytes = bytes_of(one, numbers[one.size_law]) + one.grown
                sizes[index] = -(-nbytes // granularity) * granularity
        return sizes

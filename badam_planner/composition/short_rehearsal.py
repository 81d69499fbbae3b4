"""A short rehearsal that answers for any depth. Pure, no torch.

The outline of a rehearsal, its full depth and the order of its events are needed again and again and found
once: many blocks have one rehearsal, and many sizes one pattern (badam_planner.composition.sizes).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from badam.plan import Rates, Target
from badam.vocabulary import Dtype, Phase
from badam_planner.composition.compose import Run, compose, composed_work
from badam_planner.composition.peaks import BlockPeaks, DepthPeaks
from badam_planner.composition.renaming import renamed, renamed_work
from badam_planner.composition.sizes import SizePattern, filled_in
from badam_planner.composition.step_time import StepTimes, Work
from badam_planner.recording.forecast import at_size, timeline_on
from badam_planner.recording.recording import Flops, Recording, settled
from badam_planner.recording.timeline import Timeline


@dataclass(slots=True)
class Rehearsed:
    """A rehearsal with four cycles of each run of equal layers, or a family's pattern of such."""

    recording: Recording
    names: Sequence[str]  # its layers in order, see names_of
    runs: Sequence[tuple[tuple[str, ...], ...]]  # the four cycles of each run, by these names
    flops_laws: dict[tuple[Phase, str], int] | None = None  # of a family's pattern
    depth_peaks_of: dict[Hashable, DepthPeaks] = field(default_factory=dict)
    paces: dict[Hashable, StepTimes] = field(default_factory=dict)
    timelines: dict[Hashable, Timeline] = field(default_factory=dict)
    works: dict[Hashable, Flops] = field(default_factory=dict)

    @classmethod
    def of(cls, rehearsed: Recording | SizePattern, layers: Sequence[str], runs: Sequence[Run]) -> Rehearsed:
        """A recording, or the pattern of a family of them, of a model whose ``layers`` form ``runs``."""
        names, stand_ins = names_of(layers, runs), [run.stand_ins() for run in runs]
        if isinstance(rehearsed, SizePattern):
            return cls(rehearsed.recording, names, stand_ins, rehearsed.flops_laws)
        return cls(rehearsed, names, stand_ins)

    def depth_peaks(self, target: Target) -> DepthPeaks:
        """Its outline for a device."""
        key = target.gpu == "cpu"
        if key not in self.depth_peaks_of:
            self.depth_peaks_of[key] = DepthPeaks(self.recording, self.runs, target)
        return self.depth_peaks_of[key]

    def step_times(self, rates: Rates | None, dtype: Dtype) -> StepTimes:
        """Its pace at given rates."""
        key = (rates and rates.model_dump_json(), dtype)
        if key not in self.paces:
            self.paces[key] = StepTimes(self.recording, self.runs, rates, dtype)
        return self.paces[key]

    def composed(self, layers: Sequence[str], runs: Sequence[Run]) -> Recording:
        """It with all ``layers`` of the model, which form ``runs``.

        Raises:
            NotPeriodic: if a run cannot be composed.
        """
        recording = renamed(self.recording, self._new_names(layers, runs))
        for run in runs:
            recording = compose(recording, run)
        return settled(recording) if self.flops_laws is None else recording

    def timeline(self, layers: Sequence[str], runs: Sequence[Run], target: Target, head_module: str) -> Timeline:
        """The timeline of what :meth:`composed` gives."""
        key = (tuple(runs), target.gpu == "cpu", head_module)
        if key not in self.timelines:
            self.timelines[key] = timeline_on(self.composed(layers, runs), target, head_module)
        return self.timelines[key]

    def flops(self, layers: Sequence[str], runs: Sequence[Run]) -> Flops:
        """Operations of what :meth:`composed` gives; of a family's pattern their laws."""
        key = tuple(runs)
        if key not in self.works:
            own = self.recording.flops if self.flops_laws is None else self.flops_laws
            flops = renamed_work(own, self._new_names(layers, runs))
            for run in runs:
                flops = composed_work(flops, run)
            self.works[key] = flops
        return self.works[key]

    def _new_names(self, layers: Sequence[str], runs: Sequence[Run]) -> dict[str, str]:
        return dict(zip(self.names, names_of(layers, runs), strict=True))


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a rehearsal says of one block of one plan: its layers, its runs' lengths and its size are known."""

    rehearsed: Rehearsed
    layers: Sequence[str]
    runs: Sequence[Run]
    numbers: Sequence[int] | None = None
    """Bytes and operations at the block's size, by law of the family; None if there is no family."""

    @property
    def _totals(self) -> list[int]:
        return [len(run.cycles) for run in self.runs]

    def recording(self) -> Recording:
        """All events at full depth; NotPeriodic is raised if it cannot be composed."""
        recording = self.rehearsed.composed(self.layers, self.runs)
        if self.numbers is None:
            return recording
        return filled_in(SizePattern(recording, self.rehearsed.flops(self.layers, self.runs)), self.numbers)

    def peaks(self, target: Target) -> BlockPeaks:
        """The peaks at full depth; NotPeriodic is raised if they cannot be told."""
        return self.rehearsed.depth_peaks(target).peaks(self._totals, self.numbers)

    def timeline(self, target: Target, head_module: str) -> Timeline:
        """The timeline at full depth; NotPeriodic is raised if it cannot be composed."""
        timeline = self.rehearsed.timeline(self.layers, self.runs, target, head_module)
        return timeline if self.numbers is None else at_size(timeline, self.numbers)

    def flops(self) -> Flops:
        """Operations at full depth."""
        flops = self.rehearsed.flops(self.layers, self.runs)
        return flops if self.numbers is None else {place: self.numbers[law] for place, law in flops.items()}

    def work_by_phase(self, rates: Rates | None, dtype: Dtype) -> dict[Phase, Work]:
        """Work and time by phase at full depth; a family's pattern has no traffic."""
        return self.rehearsed.step_times(rates, dtype).work_by_phase(self._totals)


def names_of(layers: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """The layers of a rehearsal in order, runs as the four cycles that they are composed from."""
    first = {run.cycles[0][0]: run for run in runs}
    inside = {layer for run in runs for cycle in run.cycles for layer in cycle}
    names: list[str] = []
    for layer in layers:
        if layer in first:
            names += [each for cycle in first[layer].stand_ins() for each in cycle]
        elif layer not in inside:
            names.append(layer)
    return names

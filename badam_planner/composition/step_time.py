"""From the work of a rehearsal and the rates of a device to seconds. Pure, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from badam.blocks.names import enclosing
from badam.plan import Rates
from badam.vocabulary import Dtype, Phase
from badam_planner.composition.layer_cycles import times_of_cycle
from badam_planner.recording.recording import MemoryTraffic, Recording

ONCE_PER_VISIT = (Phase.SWITCH, Phase.SETUP)
"""What happens when a block is left and the next one made ready, and not in every step."""


def seconds_of(flops: int, traffic: MemoryTraffic, rates: Rates, dtype: Dtype) -> float:
    """Time of the work that one module does in one phase.

    Formula: max(products' operations / rate, products' bytes / bandwidth) + other bytes / bandwidth, and no less than
    the time to start so many operators (the roofline model: https://doi.org/10.1145/1498765.1498785).
    Units: seconds. Not counted: what overlaps, caches, and waiting for data.
    """
    products = max(flops / rates.flops_per_second[dtype], traffic.product_bytes / rates.bytes_per_second)
    return max(products + traffic.other_bytes / rates.bytes_per_second, traffic.operators * rates.seconds_per_operator)


@dataclass(frozen=True, slots=True)
class Work:
    """Work, and the time that it takes; 0 seconds where no rates are known."""

    flops: float = 0
    product_bytes: float = 0
    other_bytes: float = 0
    operators: float = 0
    seconds: float = 0.0

    def plus(self, other: Work, times: float = 1) -> Work:
        """This and ``times`` the other."""
        return Work(
            self.flops + times * other.flops,
            self.product_bytes + times * other.product_bytes,
            self.other_bytes + times * other.other_bytes,
            self.operators + times * other.operators,
            self.seconds + times * other.seconds,
        )


class StepTimes:
    """How much each phase of an optimizer step takes, for any number of cycles of a rehearsal's runs."""

    def __init__(
        self, recording: Recording, runs: Sequence[Sequence[tuple[str, ...]]], rates: Rates | None, dtype: Dtype
    ) -> None:
        """Read a recording.

        Args:
            recording: of a rehearsal.
            runs: for each run of equal cycles the layers (module paths) of its four cycles.
            rates: of the device, if known.
            dtype: in which products are made.
        """
        cycle_of = {
            layer: (number, place)
            for number, cycles in enumerate(runs)
            for place, cycle in enumerate(cycles)
            for layer in cycle
        }
        self._shares: dict[tuple[Phase, tuple[int, int] | None], Work] = {}
        for phase, module in recording.flops.keys() | recording.traffic.keys():
            flops = recording.flops.get((phase, module), 0)
            moved = recording.traffic.get((phase, module), MemoryTraffic())
            seconds = 0.0 if rates is None else seconds_of(flops, moved, rates, dtype)
            work = Work(flops, moved.product_bytes, moved.other_bytes, moved.operators, seconds)
            share = (phase, cycle_of.get(enclosing(module, cycle_of)))
            self._shares[share] = self._shares.get(share, Work()).plus(work)

    def work_by_phase(self, totals: Sequence[int]) -> dict[Phase, Work]:
        """By phase, with ``totals[i]`` cycles of run ``i``."""
        work_by_phase: dict[Phase, Work] = {}
        for (phase, place), share in self._shares.items():
            times = 1 if place is None else times_of_cycle(place[1], totals[place[0]])
            work_by_phase[phase] = work_by_phase.get(phase, Work()).plus(share, times)
        return work_by_phase


def mean_work(blocks: Sequence[Mapping[Phase, Work]]) -> dict[Phase, Work]:
    """By phase the mean over the blocks, each of which is active for as many steps as the others."""
    means: dict[Phase, Work] = {}
    for work_by_phase in blocks:
        for phase, work in work_by_phase.items():
            means[phase] = means.get(phase, Work()).plus(work, 1 / len(blocks))
    return means


def step_seconds(by_phase: dict[Phase, float], switch_every: int) -> float:
    """Time of one optimizer step, with its share of the switch at the end of the visit.

    Args:
        by_phase: seconds of all micro-batches of a step together.
        switch_every: steps per visit; none or less never switches.
    """
    visit = sum(by_phase.get(phase, 0.0) for phase in ONCE_PER_VISIT)
    steps = sum(seconds for phase, seconds in by_phase.items() if phase not in ONCE_PER_VISIT)
    return steps + (visit / switch_every if switch_every > 0 else 0.0)

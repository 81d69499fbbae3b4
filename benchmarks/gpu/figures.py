"""From the records of one machine to the figures that the documentation shows. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from badam.profiling.record import MeasuredRun, Measurement
from badam.vocabulary import Phase
from badam_planner.accuracy.compare import compare
from badam_planner.accuracy.comparison import Comparison, Pair
from benchmarks.gpu.record import CaseRecord

TOTALS = ("allocated", "reserved", "device")


@dataclass(frozen=True, slots=True)
class Row:
    """One measured case beside its prediction."""

    record: CaseRecord
    comparison: Comparison

    def total(self, name: str) -> Pair:
        """The peak over the whole run: one of :data:`TOTALS`."""
        return next(row.memory for row in self.comparison.totals if row.name == name)

    @property
    def worst_block(self) -> Pair | None:
        """The block whose own peak is most off; None if none was measured."""
        pairs = [row.memory for row in self.comparison.blocks if row.memory.error_fraction is not None]
        return max(pairs, key=lambda pair: abs(pair.error_fraction or 0.0), default=None)


@dataclass(frozen=True, slots=True)
class Spread:
    """How far a total was off over all cases, as fractions of what was measured. The worst has its sign."""

    name: str
    cases: int
    median: float
    worst: float
    worst_case: str


@dataclass(frozen=True, slots=True)
class Rivals:
    """One case under this project's optimizer and under badam 1.4's."""

    own: CaseRecord
    old: CaseRecord


def rows(records: Iterable[CaseRecord]) -> list[Row]:
    """The measured cases that have a prediction, by name."""
    found = []
    for record in sorted(records, key=lambda record: record.case.name):
        plan = record.latest_plan
        if record.run is None or plan is None or plan.prediction is None or record.case.side != "own":
            continue
        found.append(Row(record, compare(plan, with_device_bytes(record, record.run))))
    return found


def with_device_bytes(record: CaseRecord, run: MeasuredRun) -> MeasuredRun:
    """The run with the device memory of its process alone.

    Where NVML tells of the whole card only, that is what torch had reserved at its peak plus the context as CUDA told
    it when the last step had ended.
    """
    account = record.account
    if account is None or account.nvml_source.endswith("this process"):
        return run
    measurement = run.measurement
    own = (measurement.peak_reserved_bytes or account.reserved_bytes) + account.context_bytes
    return run.model_copy(update={"measurement": measurement.model_copy(update={"peak_device_bytes": own})})


def spreads(compared: Sequence[Row]) -> list[Spread]:
    """Median and worst error of each total that was measured."""
    found = []
    for name in TOTALS:
        errors = [
            (error, row.record.case.name) for row in compared if (error := row.total(name).error_fraction) is not None
        ]
        if errors:
            worst, case = max(errors, key=lambda one: abs(one[0]))
            found.append(Spread(name, len(errors), statistics.median(abs(error) for error, _ in errors), worst, case))
    return found


def rivals(records: Iterable[CaseRecord]) -> list[Rivals]:
    """Cases that were measured with both optimizers."""
    measured = {record.case.name: record for record in records if record.run is not None}
    pairs = []
    for _, old in sorted(measured.items()):
        own = measured.get(old.case.model_copy(update={"side": "own"}).name)
        if old.case.side == "badam-1.4" and own is not None:
            pairs.append(Rivals(own, old))
    return pairs


def seconds(measurement: Measurement, *phases: Phase) -> float | None:
    """Median seconds that some phases take in an optimizer step, together; None if none of them was seen."""
    seen = [measurement.seconds_by_phase[phase] for phase in phases if phase in measurement.seconds_by_phase]
    return sum(seen) if seen else None

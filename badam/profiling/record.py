"""The measured run: what ``badam-train`` saw, in the words of the plan. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from badam.plan import Bytes, ModelSpec, Provenance, Record, Seconds, Training, load_record
from badam.vocabulary import Category, Method, Phase


class Machine(Record):
    """The machine that a run was measured on."""

    device: Literal["cpu", "cuda"]
    device_name: str
    device_total_bytes: Bytes
    cpu_count: PositiveInt
    platform: str


class BlockMeasurement(Record):
    """What was measured while one block was active."""

    name: str
    steps: NonNegativeInt  # optimizer steps with memory measured
    peak_allocated_bytes: Bytes
    peak_phase: Phase
    peak_by_phase: dict[Phase, Bytes]
    seconds_by_phase: dict[Phase, Seconds]  # median per optimizer step (switch: per switch)


class Measurement(Record):
    """What was measured over the whole run; the fields match badam.plan.Prediction."""

    memory_source: str  # how bytes were measured, in words
    peak_allocated_bytes: Bytes
    peak_reserved_bytes: Bytes | None = None  # None where the allocator does not reserve (CPU)
    peak_device_bytes: Bytes | None = None
    by_category: dict[Category, Bytes]  # at the peak; what cannot be told apart is summed under ACTIVATION
    by_phase: dict[Phase, Bytes]  # highest allocated bytes within each phase
    peak_phase: Phase
    peak_block: str
    seconds_by_phase: dict[Phase, Seconds]  # median per optimizer step
    step_seconds: Seconds  # median wall time of a whole optimizer step
    blocks: tuple[BlockMeasurement, ...]
    steps: PositiveInt
    first_loss: float
    last_loss: float
    tokens_per_second: float = Field(ge=0)


class GpuMeasurement(Record):
    """What one of several cards needed."""

    rank: NonNegativeInt
    peak_allocated_bytes: Bytes
    peak_reserved_bytes: Bytes | None = None
    peak_device_bytes: Bytes | None = None
    step_seconds: Seconds


class MeasuredRun(Record):
    """One run: which plan, on which machine, with which versions, and what was measured."""

    schema_version: Literal[1] = 1
    plan_digest: str  # badam.plan.record_digest of the plan that ran
    model: ModelSpec
    method: Method
    training: Training
    measurement: Measurement
    machine: Machine
    provenance: Provenance
    cards: tuple[GpuMeasurement, ...] = ()  # of several: all of them, while measurement is that of the worst


def of_all_gpus(runs: Sequence[MeasuredRun]) -> MeasuredRun:
    """One record of what each of several cards measured, by rank: that of the highest peak, and a line for each."""
    if len(runs) == 1:
        return runs[0]
    worst = max(runs, key=lambda run: run.measurement.peak_allocated_bytes)
    names = [name for name in GpuMeasurement.model_fields if name != "rank"]
    cards = tuple(
        GpuMeasurement(rank=rank, **{name: getattr(run.measurement, name) for name in names})
        for rank, run in enumerate(runs)
    )
    return worst.model_copy(update={"cards": cards})


def load_measured(path: str | Path) -> MeasuredRun:
    """Read and validate a measured run; raises PlanError like badam.plan.load_plan."""
    return load_record(Path(path), MeasuredRun, "measured run", "Make one with badam-train --plan plan.json.")

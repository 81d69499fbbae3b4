"""What measured runs say about a machine, in the terms in which a plan predicts. Pure.

A calibration keeps a few numbers per run and derives everything else from them, so a run that is added twice counts
once, and a margin always rests on measurements that can be looked at.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import Field, PositiveInt

from badam.errors import InputError
from badam.plan import Bytes, Plan, Prediction, Rates, Record, Target, record_digest
from badam.profiling.record import MeasuredRun
from badam.units import format_bytes
from badam.vocabulary import Dtype, Phase

DTYPES: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")


class CalibrationSample(Record):
    """One run: what its plan predicted, what was measured, and how fast it was. Bytes, seconds."""

    run_digest: str  # badam.plan.record_digest of the measured run
    model: str
    setting: str  # method, partition, batch and length, in words
    date: str
    torch: str
    predicted_allocated_bytes: Bytes
    predicted_reserved_bytes: Bytes
    predicted_device_bytes: Bytes
    planned_context_bytes: Bytes
    planned_workspace_bytes: Bytes
    measured_allocated_bytes: Bytes
    measured_reserved_bytes: Bytes | None
    measured_device_bytes: Bytes | None
    dtype: Dtype
    flops_per_second: float | None = Field(ge=0)  # of matrix products in forward and loss
    bytes_per_second: float | None = Field(ge=0)  # of the optimizer step

    @property
    def context_bytes(self) -> int | None:
        """Device memory outside torch's allocator: device less reserved."""
        if self.measured_device_bytes is None or self.measured_reserved_bytes is None:
            return None
        return max(0, self.measured_device_bytes - self.measured_reserved_bytes)

    @property
    def workspace_bytes(self) -> int | None:
        """Allocated bytes that the timeline does not explain.

        Formula: measured allocated - (predicted allocated - planned workspace). None where nothing is reserved: on a
        CPU no workspace goes through torch.
        Not counted: what else the timeline may have missed; it cannot be told from workspace.
        """
        if self.measured_reserved_bytes is None:
            return None
        explained = self.predicted_allocated_bytes - self.planned_workspace_bytes
        return max(0, self.measured_allocated_bytes - explained)

    @property
    def reserved_residual_bytes(self) -> int | None:
        """How much more the allocator held beyond tensors than its simulation said; negative where it held less."""
        if self.measured_reserved_bytes is None:
            return None
        predicted = self.predicted_reserved_bytes - self.predicted_allocated_bytes
        return self.measured_reserved_bytes - self.measured_allocated_bytes - predicted

    def shortfall_bytes(self, context_bytes: int, workspace_bytes: int) -> int:
        """Measured less predicted, had the plan used these figures: on the device, or allocated where that is all."""
        if self.measured_device_bytes is None:
            return self.measured_allocated_bytes - self.predicted_allocated_bytes
        corrected = self.predicted_device_bytes + (context_bytes - self.planned_context_bytes)
        return self.measured_device_bytes - corrected - (workspace_bytes - self.planned_workspace_bytes)


class Calibration(Record):
    """A machine as its runs show it. Figures are medians over the runs, the margin is a maximum."""

    schema_version: Literal[1] = 1
    gpu: str  # what plans call the device
    device_name: str
    device_total_bytes: PositiveInt
    samples: tuple[CalibrationSample, ...] = Field(min_length=1)

    @property
    def context_bytes(self) -> int | None:
        return _median(sample.context_bytes for sample in self.samples)

    @property
    def workspace_bytes(self) -> int | None:
        return _median(sample.workspace_bytes for sample in self.samples)

    @property
    def reserved_residual_bytes(self) -> int | None:
        return _median(sample.reserved_residual_bytes for sample in self.samples)

    @property
    def bytes_per_second(self) -> float | None:
        rates = [rate for sample in self.samples if (rate := sample.bytes_per_second) is not None]
        return statistics.median(rates) if rates else None

    @property
    def flops_per_second(self) -> dict[Dtype, float]:
        """Of matrix products, by the type of their operands; types that no run was made with are not in it."""
        reached: dict[Dtype, list[float]] = {}
        for sample in self.samples:
            if sample.flops_per_second is not None:
                reached.setdefault(sample.dtype, []).append(sample.flops_per_second)
        return {dtype: statistics.median(rates) for dtype, rates in reached.items()}

    @property
    def margin_bytes(self) -> int:
        """The most by which a run needed more than its plan said; never negative.

        Each run is judged with the context and workspace of the *other* runs, since its own would explain it away; a
        single run is judged with the figures of its plan.
        """
        return max(0, *(self._shortfall(index) for index in range(len(self.samples))))

    def _shortfall(self, index: int) -> int:
        sample, others = self.samples[index], [*self.samples[:index], *self.samples[index + 1 :]]
        context = _median(other.context_bytes for other in others)
        workspace = _median(other.workspace_bytes for other in others)
        return sample.shortfall_bytes(
            sample.planned_context_bytes if context is None else context,
            sample.planned_workspace_bytes if workspace is None else workspace,
        )

    def sentence(self) -> str:
        """What a plan that uses this calibration says about it."""
        parts = [
            f"{name} {format_bytes(size)}"
            for name, size in (("context", self.context_bytes), ("workspace", self.workspace_bytes))
            if size is not None
        ]
        runs = f"{len(self.samples)} run{'s' if len(self.samples) > 1 else ''}"
        figures = ", ".join([*parts, f"margin {format_bytes(self.margin_bytes)}"])
        return f"Calibrated by {runs} on {self.device_name}: {figures}."


def sample_of(plan: Plan, run: MeasuredRun) -> CalibrationSample:
    """What one run contributes.

    Raises:
        InputError: if the plan has no prediction, or the run was not started with it.
    """
    prediction, measurement = plan.prediction, run.measurement
    if prediction is None or run.plan_digest != record_digest(plan):
        reason = "has no prediction" if prediction is None else "is not the one that the run was started with"
        raise InputError(
            f"Cannot calibrate with a run of {run.model.id} from {run.provenance.date}: its plan {reason}.",
            advice="Give the plan file of that very run.",
        )
    training = run.training
    byte_rate = _byte_rate(prediction, run)
    library = plan.target.communication_bytes  # is no part of the context, which plans for one card need as well
    return CalibrationSample(
        run_digest=record_digest(run),
        model=run.model.id,
        setting=f"{run.method}, {plan.partition.strategy} blocks, {training.batch_size} x {training.seq_len}, "
        f"checkpointing {training.checkpointing}",
        date=run.provenance.date,
        torch=run.provenance.versions.get("torch", "unknown"),
        predicted_allocated_bytes=prediction.peak_allocated_bytes,
        predicted_reserved_bytes=prediction.peak_reserved_bytes,
        predicted_device_bytes=prediction.peak_device_bytes - library,
        planned_context_bytes=plan.target.context_bytes,
        planned_workspace_bytes=plan.target.workspace_bytes,
        measured_allocated_bytes=measurement.peak_allocated_bytes,
        measured_reserved_bytes=measurement.peak_reserved_bytes,
        measured_device_bytes=_less(measurement.peak_device_bytes, library),
        dtype=training.dtype,
        flops_per_second=_product_rate(prediction, run, byte_rate),
        bytes_per_second=byte_rate,
    )


def _less(nbytes: int | None, library: int) -> int | None:
    return None if nbytes is None else max(0, nbytes - library)


def calibrate(gpu: str, runs: Sequence[tuple[Plan, MeasuredRun]], known: Calibration | None = None) -> Calibration:
    """A calibration from runs of one machine, added to what is ``known`` of it.

    Args:
        gpu: what plans call the device.
        runs: each run with its plan; at least one.
        known: the earlier calibration of the same device.

    Raises:
        InputError: if the runs are of different devices, or one does not belong to its plan.
    """
    machine = runs[0][1].machine
    names = {run.machine.device_name for _, run in runs} | ({known.device_name} if known else set())
    if len(names) > 1:
        raise InputError(
            f"These runs are of different devices: {', '.join(sorted(names))}.", advice="Calibrate one at a time."
        )
    samples = {sample.run_digest: sample for sample in (known.samples if known else ())}
    samples.update((sample.run_digest, sample) for sample in (sample_of(plan, run) for plan, run in runs))
    return Calibration(
        gpu=gpu,
        device_name=machine.device_name,
        device_total_bytes=machine.device_total_bytes,
        samples=tuple(samples.values()),
    )


def calibrated(target: Target, calibration: Calibration) -> Target:
    """``target`` with measured context, workspace and rates, and with the margin taken off what is usable."""
    context, workspace = calibration.context_bytes, calibration.workspace_bytes
    return target.model_copy(
        update={
            "context_bytes": target.context_bytes if context is None else context,
            "workspace_bytes": target.workspace_bytes if workspace is None else workspace,
            "usable_bytes": max(0, target.usable_bytes - calibration.margin_bytes),
            "rates": _calibrated_rates(target.rates, calibration),
        }
    )


def _calibrated_rates(assumed: Rates | None, calibration: Calibration) -> Rates | None:
    """What runs reached; types that no run was made with keep what is assumed, or share what the others reached."""
    products, moved = calibration.flops_per_second, calibration.bytes_per_second
    if not products or moved is None:
        return assumed
    slowest = min(products.values())
    known: dict[Dtype, float] = dict.fromkeys(DTYPES, slowest) if assumed is None else assumed.flops_per_second
    return Rates(
        flops_per_second={**known, **products},
        bytes_per_second=moved,
        seconds_per_operator=0.0 if assumed is None else assumed.seconds_per_operator,
        basis=f"at the rates that {len(calibration.samples)} measured run(s) reached",
    )


def _product_rate(prediction: Prediction, run: MeasuredRun, bytes_per_second: float | None) -> float | None:
    """Floating-point operations per second that forward and loss reach in matrix products.

    Formula: operations / (seconds - other operators' bytes / bandwidth), the time model of
    badam_planner.composition.step_time.
    None where the other operators alone would take longer than was measured.
    """
    work = [
        prediction.work_by_phase[phase] for phase in (Phase.FORWARD, Phase.LOSS) if phase in prediction.work_by_phase
    ]
    seconds = run.measurement.seconds_by_phase
    spent = seconds.get(Phase.FORWARD, 0.0) + seconds.get(Phase.LOSS, 0.0)
    if bytes_per_second is None:
        return None
    left = spent - sum(each.other_bytes for each in work) / bytes_per_second
    return sum(each.flops for each in work) / left if left > 0 else None


def _byte_rate(prediction: Prediction, run: MeasuredRun) -> float | None:
    """Bytes per second that the optimizer step moves: its tensors read and written, clipping included."""
    work = prediction.work_by_phase.get(Phase.STEP)
    seconds = run.measurement.seconds_by_phase.get(Phase.STEP)
    return (work.product_bytes + work.other_bytes) / seconds if work and seconds else None


def _median(sizes: Iterable[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return round(statistics.median(known)) if known else None

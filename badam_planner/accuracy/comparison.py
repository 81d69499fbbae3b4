"""What a comparison of predicted with measured memory and time consists of. Plain data that renderers show."""

from __future__ import annotations

from dataclasses import dataclass

from badam.plan import Plan, Prediction
from badam.profiling.record import MeasuredRun, Measurement
from badam.vocabulary import Category, Phase

NOT_ATTRIBUTED = "not attributed"
"""The part of a peak that its record puts in no category."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A predicted and a measured amount in bytes; None where one side has no figure."""

    predicted: int | None
    measured: int | None

    @property
    def error_bytes(self) -> int | None:
        """Predicted less measured: positive where the prediction was too high."""
        return None if self.predicted is None or self.measured is None else self.predicted - self.measured

    @property
    def error_fraction(self) -> float | None:
        """The error as a fraction of the measured amount; None where there is nothing to divide by."""
        error = self.error_bytes
        if error is None:
            return None
        if error == 0:
            return 0.0
        return error / self.measured if self.measured else None


@dataclass(frozen=True, slots=True)
class TotalRow:
    """A peak over the whole run: ``allocated``, ``reserved`` or ``device``."""

    name: str
    memory: Pair


@dataclass(frozen=True, slots=True)
class PhaseRow:
    """The highest allocated bytes within one phase, and the median seconds that it took per optimizer step."""

    phase: Phase
    memory: Pair
    seconds: float | None
    predicted_seconds: float | None = None  # None where the plan's device has no known rates

    @property
    def name(self) -> str:
        return self.phase.value


@dataclass(frozen=True, slots=True)
class CategoryRow:
    """One part of the peak. ``category`` is None for measured bytes that the run did not attribute."""

    category: Category | None
    memory: Pair

    @property
    def name(self) -> str:
        if self.category is Category.ACTIVATION:
            return "activation and rest"
        return NOT_ATTRIBUTED if self.category is None else self.category.value


@dataclass(frozen=True, slots=True)
class BlockRow:
    """One block's peak and its backward time, recomputation included.

    ``predicted_backward_seconds`` takes its scale from the run and its shape from the plan: the predicted backward
    work of the compared blocks, scaled so that their sum equals the measured one. It tests how backward time is
    distributed over blocks, not how fast the machine is.
    """

    name: str
    memory: Pair
    predicted_phase: Phase | None
    measured_phase: Phase | None
    steps: int
    backward_seconds: float | None
    predicted_backward_seconds: float | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether every judged error is within the tolerance, and the largest of them.

    Judged are the totals and the peak of every block that was visited. Phases and categories explain an error; they
    are not judged, since a small part may be far off without consequence.
    """

    tolerance: float
    worst_name: str
    worst: Pair
    passed: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that a report shows about one plan and one run of it."""

    plan: Plan
    run: MeasuredRun
    totals: tuple[TotalRow, ...]
    phases: tuple[PhaseRow, ...]
    categories: tuple[CategoryRow, ...]
    blocks: tuple[BlockRow, ...]
    verdict: Verdict
    predicted_fits: bool
    measured_fits: bool | None  # None where the run could not measure what the whole process takes on the device
    notes: tuple[str, ...]

    @property
    def allocated(self) -> Pair:
        """The peak that the category rows sum to."""
        return self.totals[0].memory

    @property
    def prediction(self) -> Prediction:
        assert self.plan.prediction is not None, "compare() refuses plans without a prediction"
        return self.plan.prediction

    @property
    def measurement(self) -> Measurement:
        return self.run.measurement


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Several comparisons together: how far off the allocated peak was, and where the decision was wrong."""

    comparisons: tuple[Comparison, ...]
    median_error: float  # of the absolute errors of the allocated peak, as a fraction
    worst: Comparison
    wrong_fits: int  # predicted to fit, measured not to
    false_refusals: int  # predicted not to fit, measured to fit
    undecided: int  # runs that could not measure device memory

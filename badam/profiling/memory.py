"""What a source of measured memory offers, and what it tells about one optimizer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from badam.profiling.states import ModelStates
from badam.vocabulary import Category, Phase


@dataclass(frozen=True, slots=True)
class StepMemory:
    """The memory of one optimizer step, in bytes.

    ``by_category`` splits the moment of the highest allocated bytes and sums to them. SETUP among the phases is the
    time between the previous step and this one.
    """

    peak_by_phase: dict[Phase, int]
    by_category: dict[Category, int]
    reserved_bytes: int | None = None
    device_bytes: int | None = None

    @property
    def peak_bytes(self) -> int:
        """The highest allocated bytes within the step."""
        return max(self.peak_by_phase.values())

    @property
    def peak_phase(self) -> Phase:
        """The phase of the peak."""
        return max(self.peak_by_phase, key=lambda phase: self.peak_by_phase[phase])


class MemorySource(Protocol):
    """Measures memory by phase; told of phases by the recorder, asked once per optimizer step."""

    description: str  # how bytes are measured, in words

    @property
    def live_bytes(self) -> int:
        """Allocated bytes when the last step ended."""

    def start(self) -> None:
        """Begin to measure; best before the model is built."""

    def attach(self, states: ModelStates) -> None:
        """Tell which tensors are known by name, so that the peak can be split."""

    def phase_begins(self, phase: Phase) -> None:
        """``phase`` begins now."""

    def end_step(self) -> StepMemory:
        """The step that has just ended."""

    def stop(self) -> None:
        """End measuring."""

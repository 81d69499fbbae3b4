"""What a source of measured memory offers, and what it tells about one optimizer step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from badam.vocabulary import Category, Phase

if TYPE_CHECKING:
    from torch import Tensor

    from badam.profiling.memory.states import ModelStates


class Boundary(NamedTuple):
    """Allocated bytes at one moment, and the highest since the boundary before (or since the step began)."""

    live_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class StepMemory:
    """The memory of one optimizer step, in bytes.

    ``by_category`` splits the moment of the highest allocated bytes and sums to them. SETUP among the phases is the
    time between the previous step and this one. ``boundaries`` answers the calls of :meth:`MemorySource.boundary`, in
    their order.
    """

    peak_by_phase: dict[Phase, int]
    by_category: dict[Category, int]
    reserved_bytes: int | None = None
    device_bytes: int | None = None
    boundaries: tuple[Boundary, ...] = ()

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
    costly: bool  # whether measuring a step takes time that is worth saving

    @property
    def live_bytes(self) -> int:
        """Allocated bytes when the last measured step ended."""

    def start(self) -> None:
        """Begin to measure; best before the model is built."""

    def attach(self, states: ModelStates) -> None:
        """Tell which tensors are known by name, so that the peak can be split."""

    def begin_step(self, batch: Iterable[Tensor]) -> None:
        """The coming step is to be measured; ``batch`` are its inputs, which exist already."""

    def phase_begins(self, phase: Phase) -> None:
        """``phase`` begins now."""

    def boundary(self) -> None:
        """Remember this moment of a measured step; its :class:`Boundary` is told by :meth:`end_step`."""

    def end_step(self, *, pause: bool) -> StepMemory:
        """The step that has just ended; with ``pause``, nothing is measured until :meth:`begin_step`."""

    def stop(self) -> None:
        """End measuring."""

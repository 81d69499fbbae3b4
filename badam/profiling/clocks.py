"""Seconds by phase: the wall clock on the CPU, CUDA events on the GPU, which runs behind Python."""

from __future__ import annotations

import itertools
import time
from collections import deque
from typing import Protocol

import torch

from badam.vocabulary import Phase

PhaseSeconds = dict[Phase, float]


class PhaseClock(Protocol):
    """Measures how long phases take; told of phases by the recorder."""

    def phase_begins(self, phase: Phase) -> None:
        """``phase`` begins now and the previous one has ended."""

    def end_step(self) -> None:
        """An optimizer step has ended."""

    def resume(self) -> None:
        """What happened since the last call belongs to no phase: it was measuring."""

    def finished(self, *, wait: bool = False) -> list[PhaseSeconds]:
        """The steps whose seconds have become known since the last call, oldest first; ``wait`` for all."""


class WallClock:
    """The host's clock; right where the host does the work."""

    def __init__(self) -> None:
        self._phase = Phase.SETUP
        self._since = time.perf_counter()
        self._seconds: PhaseSeconds = {}
        self._finished: list[PhaseSeconds] = []

    def phase_begins(self, phase: Phase) -> None:
        """Book the time since the last change on the phase that ends."""
        now = time.perf_counter()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now

    def end_step(self) -> None:
        """Close the books of one step."""
        self._finished.append(self._seconds)
        self._seconds = {}

    def resume(self) -> None:
        """Forget the time since the last change."""
        self._since = time.perf_counter()

    def finished(self, *, wait: bool = False) -> list[PhaseSeconds]:
        """All steps that have ended since the last call."""
        finished, self._finished = self._finished, []
        return finished


class CudaClock:
    """CUDA events on the current stream; reads them when the GPU has passed them, and never waits during the run."""

    def __init__(self) -> None:
        self._begun: list[tuple[Phase, torch.cuda.Event]] = [(Phase.SETUP, _event())]
        self._pending: deque[list[tuple[Phase, torch.cuda.Event]]] = deque()

    def phase_begins(self, phase: Phase) -> None:
        """Put an event on the stream."""
        self._begun.append((phase, _event()))

    def end_step(self) -> None:
        """Close the chain of events of one step."""
        self._pending.append(self._begun)
        self._begun = [self._begun[-1]]

    def resume(self) -> None:
        """Begin the current phase again from here."""
        self._begun[-1] = (self._begun[-1][0], _event())

    def finished(self, *, wait: bool = False) -> list[PhaseSeconds]:
        """The steps that the GPU has completed since the last call."""
        if wait:
            torch.cuda.synchronize()
        found = []
        while self._pending and self._pending[0][-1][1].query():
            found.append(_elapsed(self._pending.popleft()))
        return found


class Ticks(Protocol):
    """Moments on the clock of the device."""

    def tick(self) -> None:
        """Note this moment."""

    def take_seconds(self) -> list[float]:
        """The moments noted since the last call, in seconds after the first of them; may wait for the device."""


class WallTicks:
    """Moments on the host's clock."""

    def __init__(self) -> None:
        self._moments: list[float] = []

    def tick(self) -> None:
        """Note this moment."""
        self._moments.append(time.perf_counter())

    def take_seconds(self) -> list[float]:
        """The moments noted since the last call, in seconds after the first of them."""
        moments, self._moments = self._moments, []
        return [moment - moments[0] for moment in moments]


class CudaTicks:
    """Moments at which the GPU gets to a place on the current stream."""

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []

    def tick(self) -> None:
        """Put an event on the stream."""
        self._events.append(_event())

    def take_seconds(self) -> list[float]:
        """The moments noted since the last call, in seconds after the first of them; waits for the GPU."""
        events, self._events = self._events, []
        if events:
            torch.cuda.synchronize()
        return [events[0].elapsed_time(event) / 1e3 for event in events]


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(chain: list[tuple[Phase, torch.cuda.Event]]) -> PhaseSeconds:
    seconds: PhaseSeconds = {}
    for (phase, begin), (_, end) in itertools.pairwise(chain):
        seconds[phase] = seconds.get(phase, 0.0) + begin.elapsed_time(end) / 1e3
    return seconds

"""Ending a run between two steps when the user or the machine asks for it."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from badam.training.processes import Processes


class Interruption:
    """While entered, SIGTERM and the first SIGINT are noted instead of acted upon; a second SIGINT acts."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def spread(self, processes: Processes) -> None:
        """Let a signal that one of the processes has got count for all of them."""
        (number,) = processes.most(self.signal or 0)
        self.signal = signal.Signals(int(number)) if number else None

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

"""Ending a run when the user or the machine asks for it: at once before training, and between two steps in it."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from badam.training.processes import Processes


class Stopped(KeyboardInterrupt):
    """A signal came before training began: there is nothing to save.

    As a KeyboardInterrupt it passes through libraries that go on after any other exception.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"stopped by {number.name} before training began")
        self.signal = number


class Interruption:
    """While entered, SIGTERM and the first SIGINT end the run; a second SIGINT ends it at once.

    Until :meth:`postpone` is called they raise :class:`Stopped`; from then on they are noted, for the loop to save and
    stop between two steps. A signal that was ignored when the run began stays so: a shell without job control starts
    what is to run in the background with SIGINT ignored, because Ctrl-C is meant for what runs in front of it.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._is_postponed = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def postpone(self) -> None:
        """Note signals from now on instead of acting upon them."""
        self._is_postponed = True

    def spread(self, processes: Processes) -> None:
        """Let a signal that one of the processes has got count for all of them."""
        (number,) = processes.most(self.signal or 0)
        self.signal = signal.Signals(int(number)) if number else None

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if not self._is_postponed:
            raise Stopped(signal.Signals(number))
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

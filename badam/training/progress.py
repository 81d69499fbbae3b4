"""What a person sees while a run goes on, and the same as lines of JSON."""

from __future__ import annotations

import errno
import io
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from badam.errors import InputError
from badam.units import format_bytes

PLAIN_LINES = 20
"""Lines of a run whose output is not a terminal."""


@dataclass(frozen=True, slots=True)
class StepView:
    """One optimizer step as shown and logged; memory in bytes."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float | None
    block: str
    tokens_per_second: float
    live_bytes: int
    peak_bytes: int  # the highest so far

    def sentence(self, planned_bytes: int | None) -> str:
        """The step on one line."""
        peak = f"peak {format_bytes(self.peak_bytes)}"
        if planned_bytes is not None:
            peak += f" of {format_bytes(planned_bytes)} planned"
        return (
            f"loss {self.loss:.3f}  lr {self.learning_rate:.2e}  block {self.block}  "
            f"{self.tokens_per_second:,.0f} tok/s  memory {format_bytes(self.live_bytes)}, {peak}"
        )


@dataclass(frozen=True, slots=True)
class EvaluationView:
    """The evaluation data after an optimizer step."""

    step: int
    loss: float
    accuracy: float | None  # of a classification

    def sentence(self) -> str:
        """The evaluation on one line."""
        accuracy = "" if self.accuracy is None else f"  accuracy {self.accuracy:.1%}"
        return f"evaluation after step {self.step}  loss {self.loss:.3f}{accuracy}"


class ProgressDisplay:
    """A live bar with the latest step under it; on anything but a terminal, a line now and then.

    Args:
        console: where to draw.
        total_steps: of the run.
        planned_bytes: the predicted peak, to show the measured one against.
    """

    def __init__(self, console: Console, total_steps: int, planned_bytes: int | None) -> None:
        self._console = console
        self._total = total_steps
        self._planned = planned_bytes
        self._progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
        )
        self._task = self._progress.add_task("training", total=total_steps)
        self._live: Live | None = None

    def start(self) -> None:
        """Begin to draw."""
        if self._console.is_terminal:
            self._live = Live(self._progress, console=self._console, refresh_per_second=4, transient=True)
            self._live.start()

    def show(self, view: StepView) -> None:
        """Draw the latest step."""
        sentence = view.sentence(self._planned)
        if self._live is not None:
            self._progress.update(self._task, completed=view.step)
            self._live.update(Group(self._progress, Text(sentence)))
        elif view.step in (1, self._total) or view.step % max(1, self._total // PLAIN_LINES) == 0:
            self._console.print(
                f"step {view.step}/{self._total}  {sentence}", highlight=False, markup=False, soft_wrap=True
            )

    def show_evaluation(self, view: EvaluationView) -> None:
        """Write the evaluation above the bar, where it stays."""
        self._console.print(view.sentence(), highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Stop drawing."""
        if self._live is not None:
            self._live.stop()
            self._live = None


class MetricsFile:
    """One JSON object per line, such as an optimizer step, appended: a resumed run goes on in the same file.

    Lines are whole or not there: a disk that is full in the middle of one takes its begin back, and what a machine that
    died has left of one is cut off before the next.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: io.FileIO | None = None

    def append(self, view: StepView | EvaluationView) -> None:
        """Write one line.

        Raises:
            InputError: if it cannot be written.
        """
        line = (json.dumps(asdict(view)) + "\n").encode()
        try:
            if self._file is None:
                self._file = _opened_after_whole_lines(self._path)
            _write_whole(self._file, line)
        except OSError as error:
            raise InputError(
                f"{self._path} could not be written: {error.strerror or error}.",
                advice="What was saved before is unchanged. Make room and continue with --resume.",
            ) from error

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _opened_after_whole_lines(path: Path) -> io.FileIO:
    """``path`` to append to, without buffer, so that nothing is left to write when it is closed."""
    if path.is_file():
        with path.open("r+b") as file:
            kept = file.read().rfind(b"\n") + 1
            file.truncate(kept)
    return io.FileIO(path, "a")


def _write_whole(file: io.FileIO, line: bytes) -> None:
    begin = file.seek(0, io.SEEK_END)
    try:
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        with suppress(OSError):
            file.truncate(begin)
        raise

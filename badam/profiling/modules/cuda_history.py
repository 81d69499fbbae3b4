"""torch's own history of CUDA allocations, in the file that its memory viewer opens (docs.pytorch.org/memory_viz)."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

SNAPSHOT_FILE = "memory_snapshot.pickle"
"""What the snapshot is called, beside measured.json."""

MAX_ENTRIES = 200_000
"""Allocations and releases that are kept, some KB each: a step of a 13B model has some ten thousands."""


class AllocatorHistory:
    """Keeps the history of the step with the highest peak, and of one that ended in an error.

    From :meth:`start` on the call stack of each allocation is kept while it lives, so that the viewer can say where
    weights and optimizer states come from; within a step, that of each release too.
    """

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="badam-snapshot-")  # until it is known where to
        self._recording = False
        self._highest_bytes = -1

    def start(self) -> None:
        """Keep the call stack of whatever is alive; before the model is built."""
        torch.cuda.memory._record_memory_history(enabled="state", context="state", stacks="python")

    def begin_step(self) -> None:
        """Begin the history of a step, forgetting that of the last."""
        torch.cuda.memory._record_memory_history(
            enabled="all", context="all", stacks="python", max_entries=MAX_ENTRIES, clear_history=True
        )
        self._recording = True

    def end_step(self, peak_bytes: int) -> None:
        """End the history of a step; it is kept if no step had a higher peak."""
        if self._recording and peak_bytes > self._highest_bytes:
            self._highest_bytes = peak_bytes
            self._dump()
        self._recording = False
        self.start()

    def stop(self) -> None:
        """End recording; a step that did not come to its end is kept: what happened in it is what one wants to see."""
        if self._recording:
            self._dump()
            self._recording = False
        torch.cuda.memory._record_memory_history(enabled=None)

    def save(self, directory: Path) -> Path | None:
        """Move the snapshot to ``directory``; None if there is none."""
        if not self._file.exists():
            return None
        return Path(shutil.move(self._file, directory / SNAPSHOT_FILE))

    @property
    def _file(self) -> Path:
        return Path(self._directory.name) / SNAPSHOT_FILE

    def _dump(self) -> None:
        torch.cuda.memory._dump_snapshot(str(self._file))

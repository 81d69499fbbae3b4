"""What full mode records beyond peaks and seconds: each module's part of a step, on CUDA the allocator's history."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from badam.profiling.clocks import CudaTicks, Ticks, WallTicks
from badam.profiling.memory.source import MemorySource, StepMemory
from badam.profiling.modules.record import MODULES_FILE, ModuleTimelines, StepModules, save_module_timelines
from badam.profiling.modules.watch import ModuleWatch, SpanIndices
from badam.vocabulary import Phase

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


PHASES = tuple(Phase)


class FullProfile:
    """Follows steps module by module, and keeps of each block the one with the highest peak.

    Args:
        device: where the model trains.
        memory: what measures bytes; told each boundary.
        ticks: what measures time; by default what fits the device.
    """

    def __init__(self, device: torch.device, memory: MemorySource, ticks: Ticks | None = None) -> None:
        self._memory = memory
        self._ticks = ticks or (CudaTicks() if device.type == "cuda" else WallTicks())
        self._history = AllocatorHistory() if device.type == "cuda" else None
        self._watch: ModuleWatch | None = None
        self._watching = False
        self._spans: list[SpanIndices] = []
        self._names: dict[str, int] = {}
        self._steps: dict[int, tuple[int, StepModules]] = {}  # by block, with the peak that chose it

    def start(self) -> None:
        """Begin to keep what the allocator can tell; before the model is built."""
        if self._history is not None:
            self._history.start()

    def attach(self, model: nn.Module) -> None:
        """Learn the modules."""
        self._watch = ModuleWatch(model, self._boundary)

    def phase_begins(self, previous: Phase, phase: Phase, *, follow: bool) -> None:
        """``phase`` begins after ``previous``; with it a step, if that was SETUP, which is to be followed or not."""
        assert self._watch is not None, "steps begin after attach()"
        if self._watching:
            self._watch.phase_begins(previous, phase)
        elif follow and previous is Phase.SETUP:
            if self._history is not None:
                self._history.begin_step()
            self._watching = True
            self._watch.begin()

    def end_step(self) -> None:
        """The step is over; its memory follows."""
        assert self._watch is not None, "steps end after attach()"
        if self._watching:
            self._spans = self._watch.end()

    def take(self, step: int, block: int, memory: StepMemory) -> None:
        """Keep the step that has ended, if it has the highest peak of its block.

        Args:
            step: its number, from 0.
            block: the block that was active.
            memory: with a boundary for each one that was set.
        """
        if not self._watching:
            return
        self._watching = False
        if self._history is not None:
            self._history.end_step(memory.peak_bytes)
        seconds = self._ticks.take_seconds()
        if block not in self._steps or memory.peak_bytes > self._steps[block][0]:
            self._steps[block] = memory.peak_bytes, self._columns(step, memory, seconds)

    def stop(self) -> None:
        """Take the hooks off the model, and end the history."""
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        if self._history is not None:
            self._history.stop()

    def save(self, directory: Path, block_names: Sequence[str], plan_digest: str) -> list[Path]:
        """Write what there is into ``directory``; may be called once.

        Args:
            directory: that of measured.json.
            block_names: by index; further blocks are called by their number.
            plan_digest: of the plan that ran, or "".

        Returns:
            The files written.

        Raises:
            PlanError: if the record cannot be written.
        """
        written = []
        if self._steps:
            save_module_timelines(self._timelines(block_names, plan_digest), directory / MODULES_FILE)
            written.append(directory / MODULES_FILE)
        if self._history is not None:
            snapshot = self._history.save(directory)
            written += [snapshot] if snapshot is not None else []
        return written

    def _timelines(self, block_names: Sequence[str], plan_digest: str) -> ModuleTimelines:
        names = dict(enumerate(block_names))
        return ModuleTimelines(
            plan_digest=plan_digest,
            names=tuple(self._names),
            phases=PHASES,
            steps=tuple(
                step.model_copy(update={"block": names.get(block, f"block {block}")})
                for block, (_, step) in sorted(self._steps.items())
            ),
        )

    def _columns(self, step: int, memory: StepMemory, seconds: Sequence[float]) -> StepModules:
        assert len(seconds) == len(memory.boundaries), "each boundary has a time and a memory"
        return StepModules(
            step=step,
            block="",  # its name is known when the record is written
            microseconds=tuple(round(second * 1e6) for second in seconds),
            live_bytes=tuple(boundary.live_bytes for boundary in memory.boundaries),
            peak_bytes=tuple(boundary.peak_bytes for boundary in memory.boundaries),
            module=tuple(self._names.setdefault(span.module, len(self._names)) for span in self._spans),
            phase=tuple(PHASES.index(span.phase) for span in self._spans),
            begin=tuple(span.begin for span in self._spans),
            end=tuple(span.end for span in self._spans),
        )

    def _boundary(self) -> None:
        self._memory.boundary()
        self._ticks.tick()

"""One process per job: several get ready at a time, one at a time has the device.

A job's process first does what needs no device (predicting), says that it is ready, and waits for its turn. So the
device does not wait for the predictor, and a process that dies takes nothing with it. Loads no torch.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

READY, GO = "ready", "go"

StartMethod = Literal["forkserver", "spawn"]


Entry = Callable[[Any, Connection], None]
"""What a job's process runs; a function of a module, called with the job and a pipe to the parent. It gets ready, sends
READY, waits for GO, and uses the device."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long and how much at a time.

    ``ahead`` processes get ready while another one has the device; with 0 a job begins when the one before has ended.
    """

    seconds: float
    seconds_per_job: float
    ahead: int


@dataclass(slots=True)
class _Child:
    name: str
    process: Any
    pipe: Connection
    ready: bool = False
    since: float | None = None  # when it got the device


@dataclass(slots=True)
class Pool:
    """Runs jobs in order.

    Args:
        entry: what a job's process runs.
        limits: see :class:`Limits`.
        ended: called with a job's name, its process's exit code (negative: the signal) and the seconds that it had
            the device.
        start: how processes are made: ``forkserver`` from one that has loaded ``preload`` already, ``spawn`` anew.
        preload: modules that take long to load.
    """

    entry: Entry
    limits: Limits
    ended: Callable[[str, int, float], None]
    start: StartMethod = "forkserver"
    preload: Sequence[str] = ()
    _children: list[_Child] = field(default_factory=list)
    _longest: float = 0.0

    def run(self, jobs: Iterable[tuple[str, Any]]) -> list[str]:
        """Run ``jobs``, pairs of a name and what the process is given; returns the names that time did not allow."""
        context: Any = multiprocessing.get_context(self.start)
        context.set_forkserver_preload(list(self.preload))
        waiting = deque(jobs)
        deadline = time.monotonic() + self.limits.seconds
        try:
            while waiting or self._children:
                while waiting and len(self._children) <= self.limits.ahead:
                    name, job = waiting.popleft()
                    self._children.append(self._start(context, name, job))
                self._give_device(deadline)
                if not self._await(deadline):
                    break
        finally:
            left = [child.name for child in self._children] + [name for name, _ in waiting]
            for child in self._children:
                self._stop(child)
            self._children.clear()
        return left

    def _start(self, context: Any, name: str, job: Any) -> _Child:
        ours, theirs = context.Pipe()
        process = context.Process(target=self.entry, args=(job, theirs), daemon=True)
        process.start()
        theirs.close()
        return _Child(name, process, ours)

    def _give_device(self, deadline: float) -> None:
        """Let the first process that is ready begin, if the device is free and time is likely to suffice."""
        if any(child.since is not None for child in self._children):
            return
        ready = next((child for child in self._children if child.ready), None)
        if ready is not None and time.monotonic() + self._longest <= deadline:
            ready.since = time.monotonic()
            ready.pipe.send(GO)

    def _await(self, deadline: float) -> bool:
        """Wait for something to happen; False when there is no time for any job that is left."""
        busy = next((child for child in self._children if child.since is not None), None)
        now = time.monotonic()
        until = deadline if busy is None or busy.since is None else busy.since + self.limits.seconds_per_job
        until = min(until, deadline)
        hopeless = busy is None and any(child.ready for child in self._children)
        if hopeless or now >= until:
            if busy is None or now >= deadline:
                return False
            self._stop(busy)
        waited = [child.pipe for child in self._children if not child.ready and not child.pipe.closed]
        happened = wait([*waited, *(child.process.sentinel for child in self._children)], timeout=max(until - now, 0))
        for child in list(self._children):
            if child.pipe in happened:
                self._hear(child)
            if not child.process.is_alive():
                self._end(child)
        return True

    @staticmethod
    def _hear(child: _Child) -> None:
        try:
            child.ready = child.pipe.recv() == READY
        except (EOFError, OSError):  # it ends without having been ready
            child.pipe.close()

    def _end(self, child: _Child) -> None:
        child.process.join()
        seconds = 0.0 if child.since is None else time.monotonic() - child.since
        self._longest = max(self._longest, seconds)
        self._children.remove(child)
        child.pipe.close()
        self.ended(child.name, int(child.process.exitcode), seconds)

    @staticmethod
    def _stop(child: _Child) -> None:
        child.process.kill()
        child.process.join()


def ahead_of_device(device: str) -> int:
    """How many processes to let get ready: a prediction keeps a core busy for as long as a case has the card.

    None on a CPU, where getting ready would slow down what is measured.
    """
    return max(1, min(6, (os.cpu_count() or 1) // 2)) if device == "cuda" else 0

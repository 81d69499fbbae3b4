"""Run independent rehearsals on several processor cores.

Threads would not help, since a rehearsal is Python from end to end, and a fresh process would import torch for seconds.
A forked one has everything already. Forking is safe here as long as no kernel has run: fake tensors run none.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from select import select
from typing import TypeVar

Result = TypeVar("Result")

MOST_WORKERS = 8
PATIENCE_SECONDS = 120.0
"""How long to wait for other processes before their share is done here."""


def available_workers() -> int:
    """Processor cores that this process may use, up to eight; 1 where processes cannot be forked."""
    if not hasattr(os, "fork") or not hasattr(os, "sched_getaffinity"):
        return 1
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)))


def run_all(tasks: Sequence[Callable[[], Result]], workers: int) -> list[Result]:
    """The results of ``tasks``, in order, found by this process and ``workers - 1`` forks of it.

    A fork takes every ``workers``-th task. What a fork does not answer, because it failed or was killed, is done here,
    so that errors are raised here too. Results are pickled.
    """
    workers = min(workers, len(tasks))
    results: dict[int, Result] = {}
    forks = [_fork(tasks, range(number, len(tasks), workers)) for number in range(1, workers)]
    deadline = time.monotonic() + PATIENCE_SECONDS
    try:
        for index in range(0, len(tasks), workers or 1):
            results[index] = tasks[index]()
    except BaseException:
        deadline = 0.0  # nobody wants the others' answers any more
        raise
    finally:
        for child, reader in forks:
            results.update(_collected(child, reader, deadline))
    return [results[index] if index in results else tasks[index]() for index in range(len(tasks))]


def _fork(tasks: Sequence[Callable[[], Result]], mine: range) -> tuple[int, int]:
    """Process number of a fork that does the tasks ``mine``, and the pipe that it writes their results to."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    try:
        os.close(reader)
        found = pickle.dumps({index: tasks[index]() for index in mine}, protocol=pickle.HIGHEST_PROTOCOL)
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(found)
    finally:
        os._exit(0)  # whatever happened: this process has no business beyond here


def _collected(child: int, reader: int, deadline: float) -> dict[int, Result]:
    """What a fork found; empty if it ended without an answer or takes too long."""
    content = bytearray()
    with suppress(OSError), os.fdopen(reader, "rb", buffering=0) as pipe:
        while select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            part = pipe.read(1 << 20)
            if not part:
                break
            content += part
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)  # it has ended or has been given up
    with suppress(ChildProcessError):
        os.waitpid(child, 0)
    try:
        found: dict[int, Result] = pickle.loads(content)
    except (pickle.UnpicklingError, EOFError, ValueError):
        return {}
    return found

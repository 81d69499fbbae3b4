"""This machine's own memory as a target: ``--gpu cpu``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from badam.errors import InputError
from badam.plan import Target

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Main memory. ``available_bytes`` is what a new process can take without swapping."""

    total_bytes: int
    available_bytes: int

    def target(self) -> Target:
        """This machine as the target of a plan: no device context, no workspace, no caching allocator."""
        return Target(gpu="cpu", total_bytes=self.total_bytes, usable_bytes=self.available_bytes)


def host_memory() -> HostMemory:
    """Memory of this machine, or of the container that this process runs in where that is less.

    Not counted: limits set by control groups of version 1, and by ``ulimit``.

    Raises:
        InputError: if the system does not say.
    """
    try:
        machine = psutil.virtual_memory()
    except (OSError, RuntimeError, psutil.Error) as error:  # a container that hides /proc, an unknown system
        raise InputError(
            "The memory of this machine could not be determined.", advice="Give it: --gpu cpu --gpu-memory 16GiB."
        ) from error
    total, available = int(machine.total), int(machine.available)
    limit = _read_number(CGROUP / "memory.max")
    if limit is not None and limit < total:
        total, available = limit, min(available, max(limit - _container_use(), 0))
    return HostMemory(total_bytes=total, available_bytes=available)


def _container_use() -> int:
    """Bytes that the container's processes hold; cached files count as free, as MemAvailable counts them."""
    used = _read_number(CGROUP / "memory.current") or 0
    try:
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return used
    return max(used - int(statistics.get("inactive_file", 0)), 0)


def _read_number(path: Path) -> int | None:
    """The number in a one-line file; None if there is no such file or it says "max"."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None

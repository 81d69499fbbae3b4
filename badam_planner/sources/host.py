"""This machine's own memory as a target: ``--gpu cpu``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from badam.errors import InputError
from badam.plan import Target
from badam.units import KIB

MEMINFO = Path("/proc/meminfo")
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
    total, available = _machine()
    limit = _read_number(CGROUP / "memory.max")
    if limit is not None and limit < total:
        total, available = limit, min(available, max(limit - _container_use(), 0))
    return HostMemory(total_bytes=total, available_bytes=available)


def _machine() -> tuple[int, int]:
    """(total, available) in bytes; without /proc all memory counts as available."""
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return _from_sysconf()
    sizes = {name: int(rest.split()[0]) * KIB for name, _, rest in (line.partition(":") for line in lines)}
    return sizes["MemTotal"], sizes.get("MemAvailable", sizes["MemTotal"])


def _from_sysconf() -> tuple[int, int]:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError) as error:
        raise InputError(
            "The memory of this machine could not be determined.", advice="Give it: --gpu cpu --gpu-memory 16GiB."
        ) from error
    return total, total


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

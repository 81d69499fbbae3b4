"""The device a plan is for: a catalogued card, the card in this machine, or this machine's own memory."""

from __future__ import annotations

from badam.errors import InputError
from badam.plan import Target
from badam.units import format_bytes
from badam_planner.sources import catalogue, host, nvml


def find_target(gpu: str, memory_bytes: int | None = None) -> Target:
    """The target called ``gpu``: "auto" asks the driver, "cpu" this machine, anything else the catalogue.

    Args:
        gpu: the name.
        memory_bytes: what one process may use, instead of what the card would offer.

    Raises:
        InputError: if there is no such card, or no driver to ask.
    """
    if gpu == "auto":
        target = nvml.detect_gpu().target()
    elif gpu == "cpu":
        target = host.host_memory().target()
    else:
        target = catalogue.find_gpu(gpu).target()
    if memory_bytes is None:
        return target
    if memory_bytes <= target.context_bytes:
        raise InputError(
            f"--gpu-memory {format_bytes(memory_bytes)} is less than the device context alone, "
            f"{format_bytes(target.context_bytes)}.",
            advice="Give the memory that a process may use, its context included.",
        )
    total = max(target.total_bytes, memory_bytes)
    return target.model_copy(update={"total_bytes": total, "usable_bytes": memory_bytes})

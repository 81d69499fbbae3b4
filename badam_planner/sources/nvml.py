"""Ask the NVIDIA driver which card is here; no driver is a normal answer. Loads no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

from badam.errors import InputError
from badam.plan import Target
from badam.units import MIB, format_bytes
from badam_planner.sources.catalogue import GpuRecord, driver_share_bytes, match_gpu

SAME_GPU_TOLERANCE = 0.1
"""Cards of one name are sold with several sizes of memory; error correction takes 6 %. Beyond this, not the record."""
UNKNOWN_CONTEXT_BYTES = 512 * MIB
LARGE_WORKSPACE_BYTES, SMALL_WORKSPACE_BYTES = 32 * MIB, 8_519_680
HOPPER = (9, 0)

NAME_A_GPU = "Name a card with --gpu, such as --gpu rtx3090, or plan for this machine's memory with --gpu cpu."


@dataclass(frozen=True, slots=True)
class DetectedGpu:
    """The card that a training process here would use, as the driver describes it."""

    name: str
    total_bytes: int
    used_bytes: int  # by whatever runs now, the driver's own share included
    driver: str
    compute_capability: tuple[int, int]
    record: GpuRecord | None  # None: a card, or a size of it, that the catalogue does not know
    others: tuple[str, ...] = ()  # names of the other cards in this machine

    @property
    def usable_bytes(self) -> int:
        """What one process can use when nothing else runs, its context included, in bytes.

        Formula: total less what the driver keeps, by the catalogue's record or else by the allowance for its size.
        """
        if self.record is None:
            return self.total_bytes - driver_share_bytes(self.total_bytes)
        return self.total_bytes - (self.record.total_bytes - self.record.usable_bytes)

    def target(self) -> Target:
        """This card as the target of a plan."""
        if self.record is not None:
            update = {"total_bytes": self.total_bytes, "usable_bytes": self.usable_bytes}
            return self.record.target().model_copy(update=update)
        large = self.compute_capability >= HOPPER
        return Target(
            gpu=self.name,
            total_bytes=self.total_bytes,
            usable_bytes=self.usable_bytes,
            context_bytes=UNKNOWN_CONTEXT_BYTES,
            workspace_bytes=LARGE_WORKSPACE_BYTES if large else SMALL_WORKSPACE_BYTES,
        )

    def describe(self) -> str:
        """One line for the person at the terminal."""
        memory = f"{format_bytes(self.total_bytes)}, {format_bytes(self.used_bytes)} in use"
        line = f"{self.name}, {memory}, driver {self.driver}"
        return line if not self.others else f"{line}; not planned for: {', '.join(self.others)}"


def detect_gpu() -> DetectedGpu:
    """The first card of this machine, or the first that ``CUDA_VISIBLE_DEVICES`` names.

    Not counted: partitions of a card (MIG); with ``CUDA_DEVICE_ORDER`` unset CUDA may count several unlike cards in
    another order than the driver.

    Raises:
        InputError: if there is no driver, no card, or the driver refuses.
    """
    import pynvml

    with _driver(pynvml):
        count = pynvml.nvmlDeviceGetCount()
        if count == 0:
            raise InputError("The NVIDIA driver reports no card in this machine.", advice=NAME_A_GPU)
        chosen = _visible_index(pynvml, count)
        handle = pynvml.nvmlDeviceGetHandleByIndex(chosen)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        names = [str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(index))) for index in range(count)]
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        total = int(memory.total)
        return DetectedGpu(
            name=names[chosen],
            total_bytes=total,
            used_bytes=int(memory.used),
            driver=str(pynvml.nvmlSystemGetDriverVersion()),
            compute_capability=(int(major), int(minor)),
            record=_record_of(names[chosen], total),
            others=tuple(name for index, name in enumerate(names) if index != chosen),
        )


@contextmanager
def _driver(pynvml: ModuleType) -> Iterator[None]:
    missing = (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded)
    try:
        pynvml.nvmlInit()
    except missing as error:
        raise InputError("No NVIDIA driver was found on this machine.", advice=NAME_A_GPU) from error
    except pynvml.NVMLError as error:
        raise InputError(f"The NVIDIA driver does not answer: {error}.", advice=NAME_A_GPU) from error
    try:
        yield
    except pynvml.NVMLError as error:
        raise InputError(f"The NVIDIA driver does not describe its card: {error}.", advice=NAME_A_GPU) from error
    finally:
        pynvml.nvmlShutdown()


def _visible_index(pynvml: ModuleType, count: int) -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return 0
    first = visible.split(",")[0].strip()
    uuids = [str(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index))) for index in range(count)]
    if first.isdecimal() and int(first) < count:
        return int(first)
    for index, uuid in enumerate(uuids):
        if first and uuid.startswith(first):
            return index
    raise InputError(
        f"CUDA_VISIBLE_DEVICES={visible!r} names none of the {count} cards in this machine.",
        advice=f"Change or unset it. {NAME_A_GPU}",
    )


def _record_of(name: str, total_bytes: int) -> GpuRecord | None:
    record = match_gpu(name)
    if record is None or abs(total_bytes - record.total_bytes) > SAME_GPU_TOLERANCE * record.total_bytes:
        return None
    return record

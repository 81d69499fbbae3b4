"""The GPUs that can be pretended: those of the catalogue whose multiprocessors are known."""

from __future__ import annotations

from dataclasses import dataclass

from badam.errors import InputError
from badam_planner.sources.catalogue import GpuRecord, find_gpu

MULTIPROCESSORS = {
    "rtx3090": (82, 1536),
    "rtx4090": (128, 1536),
    "a100-40gb": (108, 2048),
    "a100-80gb": (108, 2048),
    "h100-sxm": (132, 2048),
    "h200": (132, 2048),
}
"""By id: how many, and threads resident on each at most."""


@dataclass(frozen=True, slots=True)
class PretendedGpu:
    """What the null device says of itself. Bytes."""

    record: GpuRecord
    multiprocessors: int
    threads_per_multiprocessor: int

    def environment(self, *, total_bytes: int | None = None, count: int = 1) -> dict[str, str]:
        """The variables that ``source/null_cuda.h`` lists.

        Args:
            total_bytes: of memory, in the place of what the catalogue says.
            count: how many of them there are.
        """
        record = self.record
        total = record.usable_bytes if total_bytes is None else total_bytes
        return {
            "NULL_CUDA_GPU": record.id,
            "NULL_CUDA_NAME": record.name,
            "NULL_CUDA_COMPUTE_CAPABILITY": record.compute_capability,
            "NULL_CUDA_MULTIPROCESSORS": str(self.multiprocessors),
            "NULL_CUDA_THREADS_PER_MULTIPROCESSOR": str(self.threads_per_multiprocessor),
            "NULL_CUDA_NVML_BYTES": str(max(record.total_bytes, total)),
            "NULL_CUDA_TOTAL_BYTES": str(total),
            "NULL_CUDA_CONTEXT_BYTES": str(record.context_bytes),
            "NULL_CUDA_COUNT": str(count),
        }


def pretended_gpu(name: str) -> PretendedGpu:
    """The GPU called ``name`` in the catalogue.

    Raises:
        InputError: if the catalogue has no such GPU, or does not know its multiprocessors.
    """
    record = find_gpu(name)
    if record.id not in MULTIPROCESSORS:
        known = ", ".join(MULTIPROCESSORS)
        raise InputError(f"How many multiprocessors {record.name} has is not known.", advice=f"Known are {known}.")
    return PretendedGpu(record, *MULTIPROCESSORS[record.id])

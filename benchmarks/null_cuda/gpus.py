"""Which GPU the null device pretends to be, from the product's catalogue."""

from __future__ import annotations

from badam_planner.sources.catalogue import GpuRecord, find_gpu

__all__ = ["GpuRecord", "find_gpu", "variables_of"]


def variables_of(gpu: GpuRecord, *, total_bytes: int | None = None, count: int = 1) -> dict[str, str]:
    """The environment variables that ``source/null_cuda.h`` lists.

    Args:
        gpu: the record of what is pretended.
        total_bytes: of memory, in the place of what the catalogue says that a process can use.
        count: how many of them there are.
    """
    total = gpu.usable_bytes if total_bytes is None else total_bytes
    return {
        "NULL_CUDA_GPU": gpu.id,
        "NULL_CUDA_NAME": gpu.name,
        "NULL_CUDA_COMPUTE_CAPABILITY": gpu.compute_capability,
        "NULL_CUDA_MULTIPROCESSORS": str(gpu.multiprocessors),
        "NULL_CUDA_THREADS_PER_MULTIPROCESSOR": str(gpu.threads_per_multiprocessor),
        "NULL_CUDA_NVML_BYTES": str(max(gpu.total_bytes, total)),
        "NULL_CUDA_TOTAL_BYTES": str(total),
        "NULL_CUDA_CONTEXT_BYTES": str(gpu.context_bytes),
        "NULL_CUDA_COUNT": str(count),
    }

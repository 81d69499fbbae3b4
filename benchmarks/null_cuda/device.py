"""Builds the null device for the torch of this Python, and says with which environment a command runs on it.

The library lies in the virtual environment, since it is compiled with the headers of the CUDA wheels there.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from badam.errors import InputError
from benchmarks.null_cuda.gpus import GpuRecord, variables_of

SOURCE = Path(__file__).parent / "source"
FOLDER = Path(sys.prefix) / "null_cuda"
LIBRARY = "null_cuda.so"
LINKS = ("libcuda.so.1", "libnvidia-ml.so.1")
"""Names of the driver's libraries, under which others load the null device."""

FLAGS = ("-std=gnu11", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter")
FLASH_SINCE = (9, 0)
"""Compute capability from which torch prefers cuDNN's attention, which is not served."""

ACTIVE = "NULL_CUDA_NAME"


def is_null_device() -> bool:
    """Whether this process runs on the null device."""
    return ACTIVE in os.environ


def build() -> Path:
    """The library, compiled if it is older than its source or not there.

    Raises:
        InputError: if this Python has no CUDA build of torch, or there is no gcc, or it refuses.
    """
    library = FOLDER / LIBRARY
    sources = sorted(path for path in SOURCE.rglob("*") if path.is_file())
    if library.exists() and library.stat().st_mtime > max(path.stat().st_mtime for path in sources):
        return library
    compiler = shutil.which("gcc")
    if compiler is None:
        raise InputError("The null CUDA device is compiled by gcc, which is not here.", advice="Install gcc.")
    FOLDER.mkdir(exist_ok=True)
    includes = [f"-I{SOURCE / 'include'}", f"-I{cuda_headers()}"]
    # Made beside its place and moved there whole: several processes may find it missing at once.
    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        made = Path(scratch) / LIBRARY
        files = [str(path) for path in sources if path.suffix == ".c"]
        command = [compiler, *FLAGS, *includes, "-o", str(made), *files, "-ldl", "-lpthread"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"The null CUDA device cannot be compiled: {done.stderr.strip()}")
        made.replace(library)
        for name in LINKS:
            link = Path(scratch) / name
            link.symlink_to(LIBRARY)
            link.replace(FOLDER / name)
    return library


def cuda_headers() -> Path:
    """The folder with the headers of the CUDA runtime that torch was built for.

    Raises:
        InputError: if there is none, as with torch's CPU build.
    """
    torch = importlib.util.find_spec("torch")
    packages = None if torch is None or torch.origin is None else Path(torch.origin).parents[1] / "nvidia"
    found = [] if packages is None else sorted(packages.glob("cu*/include/cuda_runtime_api.h"))
    if not found:
        raise InputError(
            f"{sys.executable} has no CUDA build of torch: the headers of the CUDA runtime are not beside it.",
            advice="Make an environment that has one with: make card.",
        )
    return found[-1].parent


def environment(
    gpu: GpuRecord, base: Mapping[str, str] = os.environ, *, total_bytes: int | None = None, count: int = 1
) -> dict[str, str]:
    """The environment of a process that is to run on the null device; builds it where it is missing.

    Args:
        gpu: which one is pretended.
        base: the environment otherwise.
        total_bytes: of memory, in the place of the pretended GPU's.
        count: how many devices there are.
    """
    library = build()
    paths = [str(FOLDER), base.get("LD_LIBRARY_PATH", "")]
    capability = tuple(int(part) for part in gpu.compute_capability.split("."))
    forced = {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"} if capability >= FLASH_SINCE else {}
    return {
        **base,
        **variables_of(gpu, total_bytes=total_bytes, count=count),
        **forced,
        "LD_PRELOAD": ":".join(part for part in (str(library), base.get("LD_PRELOAD", "")) if part),
        "LD_LIBRARY_PATH": ":".join(part for part in paths if part),
    }

"""Tests on the null CUDA device. They need torch's CUDA build, so they are collected only when asked for by path."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.null_cuda.device import environment
from benchmarks.null_cuda.gpus import find_gpu

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SECONDS = 900
"""More than any command takes here, on a busy machine too; one that waits for what never comes must end."""

OnDevice = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave these tests out of a run of all of them: make test has no CUDA build of torch."""
    asked = (Path(argument.partition("::")[0]).resolve() for argument in config.args)
    return None if any(HERE in (path, *path.parents) for path in asked) else True


@pytest.fixture
def on_device(tmp_path: Path) -> OnDevice:
    """Runs a command of this environment on the null device, in an empty directory, and returns what it said."""

    def run(
        *command: str,
        gpu: str = "rtx3090",
        count: int = 1,
        total_bytes: int | None = None,
        variables: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        # A user's own settings, caches and devices are not those of a test.
        base = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
        base |= {"TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        base.pop("CUDA_VISIBLE_DEVICES", None)
        base["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{base['PATH']}"
        prepared = environment(find_gpu(gpu), base, count=count, total_bytes=total_bytes)
        return subprocess.run(
            command,
            cwd=tmp_path,
            env={**prepared, **(variables or {})},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )

    return run

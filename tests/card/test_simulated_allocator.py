"""The simulated allocator on requests that torch's own allocator has served: both reserve the same, to the byte."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.parametrize(
    ("case", "gpu", "expandable"),
    [
        ("llama-3-2-1b.layer.all.full.1x256", "rtx3090", False),
        ("llama-3-2-1b.layer.all.full.1x256", "rtx3090", True),
        ("qwen2-5-0-5b.badam-ratio.none.full.8x512", "h200", False),
        ("qwen2-5-0-5b.layer.all.chunked.32x512", "a100-80gb", True),
    ],
)
def test_the_simulated_allocator_reserves_what_torchs_allocator_reserves(
    on_device: Run, case: str, gpu: str, expandable: bool
) -> None:
    options = ["--expandable-segments"] if expandable else []
    variables = {"PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:{expandable}", "TORCH_SYMBOLIZE_MODE": "dladdr"}
    command = [sys.executable, "-m", "benchmarks.null_cuda.trace", case, *options]
    done = on_device(*command, gpu=gpu, variables=variables)
    assert "on the real requests: allocated +0 B, reserved +0 B" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_it_is_exact_on_the_streams_of_one_of_several_processes(on_device: Run, engine: str) -> None:
    options = ["--num-gpus", "2", "--engine", engine, "--gpu", "a100-80gb", "--batch-size", "2", "--seq-len", "128"]
    planned = on_device("badam-plan", "badam/demo-llama-12m", *options, "--switch-every", "2")
    assert planned.returncode == 0, planned.stdout + planned.stderr
    # DeepSpeed would take a true byte for an overflow, and skip its step.
    variables = {"TORCH_SYMBOLIZE_MODE": "dladdr", "NULL_CUDA_TRUTH": "0" if engine == "zero3" else "1"}
    command = [sys.executable, "-m", "benchmarks.null_cuda.trace", "plan.json", "--visits", "2"]
    done = on_device(*command, gpu="a100-80gb", variables=variables)
    assert "on the real requests: allocated +0 B, reserved +0 B" in done.stdout, done.stdout + done.stderr
    assert "OVERFLOW" not in done.stdout + done.stderr

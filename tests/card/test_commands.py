"""The three commands on a pretended RTX 3090, as a user types them, on a model of 12 million parameters."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]
MODEL = "badam/demo-llama-12m"
PLAN = ("--batch-size", "8", "--seq-len", "256", "--switch-every", "2")
TRAIN = ("--plan", "plan.json", "--output-dir", "run", "--max-steps", "4", "--pad-to", "plan")


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def loaded(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_plan_train_and_report_run_on_a_gpu_that_the_driver_names(on_device: Run, tmp_path: Path) -> None:
    succeeded(on_device("badam-plan", MODEL, "--gpu", "auto", *PLAN))
    plan = loaded(tmp_path / "plan.json")
    assert plan["target"]["gpu"] == "rtx3090"

    succeeded(on_device("badam-train", *TRAIN))
    measured = loaded(tmp_path / "run" / "measured.json")
    assert measured["machine"]["device_name"] == "NVIDIA GeForce RTX 3090 (null device)"
    assert "NVML, this process" in measured["measurement"]["memory_source"]
    peaks = {name: measured["measurement"][f"peak_{name}_bytes"] for name in ("allocated", "reserved", "device")}
    assert plan["model"]["parameters"] * 2 < peaks["allocated"] < peaks["reserved"] < peaks["device"]
    assert peaks["device"] == peaks["reserved"] + plan["target"]["context_bytes"]

    report = on_device("badam-report", "plan.json", "run/measured.json", "--tolerance", "100")
    assert "run on NVIDIA GeForce RTX 3090 (null device)" in re.sub(r"\s+", " ", succeeded(report))


def test_a_run_that_the_gpu_refuses_ends_with_the_code_of_a_run_that_ran_out_of_memory(on_device: Run) -> None:
    succeeded(on_device("badam-plan", MODEL, "--gpu", "rtx3090", *PLAN))
    done = on_device("badam-train", *TRAIN, total_bytes=400 * 2**20)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "Out of memory" in done.stdout + done.stderr


def test_two_processes_train_a_plan_for_two_gpus(on_device: Run, tmp_path: Path) -> None:
    options = ("--num-gpus", "2", "--engine", "fsdp2", "--gpu", "a100-80gb")
    succeeded(on_device("badam-plan", MODEL, *options, *PLAN))
    # badam-train is a script of this environment; torchrun starts it with the same Python.
    train = str(Path(sys.executable).with_name("badam-train"))
    launch = ("torchrun", "--nproc-per-node", "2", train, *TRAIN)
    succeeded(on_device(*launch, gpu="a100-80gb", count=2))
    measured = loaded(tmp_path / "run" / "measured.json")
    each = [gpu["peak_allocated_bytes"] for gpu in measured.get("gpus", measured.get("cards"))]
    assert len(each) == 2
    assert min(each) > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "rtx3091", "--", "true"], "no GPU called 'rtx3091'"),
        (["--gpu", "rtx3090"], "Name a command after --"),
        (["--", "no-such-command"], "Cannot run no-such-command"),
    ],
)
def test_bad_input_to_the_null_device_ends_in_one_sentence(arguments: list[str], said: str) -> None:
    command = [sys.executable, "-m", "benchmarks.null_cuda", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr

"""badam-train started by torchrun: sharded over two processes, or with whole copies, against one process."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from badam.plan import Plan, save_record
from badam.training.run_directory import newest_whole, step_of
from tests.badam_planner.rehearsal.plans import LLAMA, plan_of

ROOT = Path(__file__).parents[3]
STEPS = 6  # three visits
ZERO3 = ("zero3",) if importlib.util.find_spec("deepspeed") else ()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "DS_ACCELERATOR": "cpu"}
LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"),
    "accelerate": (
        "accelerate.commands.launch",
        *("--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "-m"),
    ),
    "deepspeed": ("deepspeed.launcher.runner", "--num_gpus=2", "--module"),
}


def plan_for(engine: str, cards: int, **settings: Any) -> Plan:
    """A plan in fp32 with visits of two steps; the global batch is 4 whatever the number of cards."""
    plan, _ = plan_of(
        {**LLAMA, "vocab_size": 1024},
        3,
        dtype="float32",
        batch_size=4 // cards,
        seq_len=16,
        learning_rate=1e-2,
        **settings,
    )
    target = plan.target.model_copy(update={"engine": engine, "num_gpus": cards})
    return plan.model_copy(update={"target": target, "schedule": plan.schedule.model_copy(update={"switch_every": 2})})


def train(
    plan: Plan, directory: Path, processes: int, *options: str, launcher: str = "torchrun"
) -> subprocess.CompletedProcess[str]:
    command = command_of(plan, directory, processes, *options, launcher=launcher)
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)


def command_of(plan: Plan, directory: Path, processes: int, *options: str, launcher: str = "torchrun") -> list[str]:
    directory.mkdir(exist_ok=True)
    save_record(plan, directory / "plan.json")
    start = ["-m", *(word.replace("=2", f"={processes}") for word in LAUNCHERS[launcher])] if processes > 1 else ["-m"]
    arguments = ["--plan", str(directory / "plan.json"), "--init", "random", "--max-steps", str(STEPS)]
    output = ["--output-dir", str(directory / "run"), "--lr-scheduler", "constant"]
    return [sys.executable, "-W", "ignore", *start, "badam_cli.train", *arguments, *output, *options]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "run" / "model" / "model.safetensors")


def losses(directory: Path) -> list[float]:
    lines = (directory / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_a_plan_runs_on_two_processes_as_on_one(tmp_path: Path, loss: Any) -> None:
    alone = tmp_path / "single"
    result = train(plan_for("single", 1, loss=loss), alone, 1, "--pad-to", "plan")
    assert result.returncode == 0, result.stderr
    for engine in ("fsdp2", "ddp", *ZERO3):
        directory = tmp_path / engine
        result = train(plan_for(engine, 2, loss=loss), directory, 2, "--pad-to", "plan")
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stderr.count("model: ") == 1
        assert len(losses(directory)) == STEPS
        torch.testing.assert_close(losses(directory), losses(alone), rtol=1e-4, atol=0)
        torch.testing.assert_close(weights(directory), weights(alone), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "processes", "options", "message"),
    [
        ("single", 2, (), "The plan is for one card, and 2 processes were started."),
        ("fsdp2", 1, (), "one process was started"),
        ("fsdp2", 2, ("--adapt",), "does not know --adapt among several processes"),
        ("zero3", 1, (), "The plan is for 2 cards under zero3, and one process was started."),
        ("ddp", 3, (), "3 processes cannot divide the 2 micro-batches of a step"),
    ],
)
def test_a_plan_that_was_started_in_the_wrong_way_is_refused(
    tmp_path: Path, engine: str, processes: int, options: tuple[str, ...], message: str
) -> None:
    result = train(plan_for(engine, 2 if engine != "single" else 1), tmp_path / "run", processes, *options)
    assert result.returncode != 0
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "run" / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "deepspeed"])
@pytest.mark.parametrize("engine", ["fsdp2", *ZERO3])
def test_other_launchers_start_the_same_run(tmp_path: Path, engine: str, launcher: str) -> None:
    if launcher == "deepspeed" and not ZERO3:
        pytest.skip("needs deepspeed")
    plan = plan_for(engine, 2)
    runs = {name: train(plan, tmp_path / name, 2, launcher=name) for name in ("torchrun", launcher)}
    for result in runs.values():
        assert result.returncode == 0, result.stderr[-3000:]
    assert losses(tmp_path / launcher) == losses(tmp_path / "torchrun")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "ddp", *ZERO3])
def test_a_run_saved_by_four_processes_within_a_visit_goes_on_in_two(tmp_path: Path, engine: str) -> None:
    plan = plan_for(engine, 4)
    result = train(plan, tmp_path / "four", 4, "--save-steps", "3", "--pad-to", "plan")
    assert result.returncode == 0, result.stderr[-3000:]
    (tmp_path / "two" / "run").mkdir(parents=True)
    shutil.copytree(tmp_path / "four" / "run" / "checkpoint-3", tmp_path / "two" / "run" / "checkpoint-3")
    result = train(plan, tmp_path / "two", 2, "--resume", "--pad-to", "plan")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "the plan is for 4 cards; these are 2, which make the same steps of 2 micro-batches each" in result.stderr
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "four")[3:], rtol=1e-5, atol=0)
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "four"), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", *ZERO3])
def test_killing_a_process_ends_the_run_and_leaves_the_checkpoint_before_it(tmp_path: Path, engine: str) -> None:
    directory = tmp_path / "run"
    command = command_of(plan_for(engine, 2), directory, 2, "--max-steps", "100000", "--save-steps", "2")
    run = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    try:
        deadline = time.monotonic() + 150
        while len(list((directory / "run").glob("checkpoint-*"))) < 2:
            assert run.poll() is None, run.communicate()[1]
            assert time.monotonic() < deadline, "no checkpoint"
            time.sleep(0.2)
        children = psutil.Process(run.pid).children()
        os.kill(children[-1].pid, signal.SIGKILL)
        message = run.communicate(timeout=60)[1]
    finally:
        run.kill()
    assert run.returncode != 0
    assert "lost another one" in message or "Signal 9 (SIGKILL)" in message
    saved = newest_whole(directory / "run")
    assert saved is not None
    assert step_of(saved) >= 4

"""badam-train started by torchrun: sharded over two processes, or with whole copies, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from badam.plan import Plan, save_record
from tests.badam_planner.probe.plans import LLAMA, plan_of

ROOT = Path(__file__).parents[3]
STEPS = 6  # three visits


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


def train(plan: Plan, directory: Path, processes: int, *options: str) -> subprocess.CompletedProcess[str]:
    directory.mkdir()
    save_record(plan, directory / "plan.json")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    arguments = ["--plan", str(directory / "plan.json"), "--init", "random", "--max-steps", str(STEPS)]
    output = ["--output-dir", str(directory / "run"), "--lr-scheduler", "constant"]
    return subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, "-m", "badam_cli.train", *arguments, *output, *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=200,
    )


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
    for engine in ("fsdp2", "ddp"):
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
        ("fsdp2", 2, ("--save-steps", "2"), "does not know --save-steps among several processes"),
        ("zero3", 1, (), "badam-train does not start DeepSpeed"),
    ],
)
def test_a_plan_that_was_started_in_the_wrong_way_is_refused(
    tmp_path: Path, engine: str, processes: int, options: tuple[str, ...], message: str
) -> None:
    result = train(plan_for(engine, 2 if engine != "single" else 1), tmp_path / "run", processes, *options)
    assert result.returncode != 0
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "run" / "run").exists()

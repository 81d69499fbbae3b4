"""How long badam-plan takes, relative to importing the libraries that it is built on.

Each command is a process of its own; the commands take turns, so a machine that changes its speed changes it for all.

    python -m benchmarks.planning_time --rounds 5 --output benchmarks/results/planning_time.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

BUILD = """
import torch, transformers.models.llama
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig
with FakeTensorMode():
    AutoModelForCausalLM.from_config(LlamaConfig(), dtype=torch.bfloat16)
"""
PYTHON = sys.executable
PLAN = [PYTHON, "-m", "badam_cli.plan"]
GPU = ["--gpu", "rtx3090"]

COMMANDS: dict[str, list[str]] = {
    "import torch, transformers": [PYTHON, "-c", "import torch, transformers"],
    "import, and build Llama-2-7B without data": [PYTHON, "-c", BUILD],
    "import typer, rich": [PYTHON, "-c", "import typer, rich"],
    "badam-plan --help": [*PLAN, "--help"],
    "badam-plan Llama-2-7B, empty cache": [*PLAN, "meta-llama/Llama-2-7b-hf", *GPU],
    "badam-plan Llama-2-7B, again": [*PLAN, "meta-llama/Llama-2-7b-hf", *GPU],
    "badam-plan Llama-3.1-405B, empty cache": [*PLAN, "meta-llama/Llama-3.1-405B", *GPU, "--gpu-memory", "2TiB"],
}
RATIOS = [
    ("badam-plan Llama-2-7B, empty cache", "import torch, transformers"),
    ("badam-plan Llama-2-7B, empty cache", "import, and build Llama-2-7B without data"),
    ("badam-plan Llama-2-7B, again", "import typer, rich"),
    ("badam-plan --help", "import typer, rich"),
    ("badam-plan Llama-3.1-405B, empty cache", "badam-plan Llama-2-7B, empty cache"),
]


def main() -> None:
    """Run all commands in turns and report medians and ratios of medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for round_number in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name, command in COMMANDS.items():
                seconds[name].append(timed(command, Path(folder)))
        print(f"round {round_number + 1} of {arguments.rounds}", file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {f"{above} / {below}": medians[above] / medians[below] for above, below in RATIOS}
    record = {
        "seconds": medians,
        "ratios": ratios,
        "rounds": arguments.rounds,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {name: version(name) for name in ("badam", "torch", "transformers", "typer", "rich")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    for name, value in {**medians, **ratios}.items():
        print(f"{value:8.2f}  {name}")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def timed(command: list[str], folder: Path) -> float:
    """Wall seconds of one run, in ``folder``, with a cache that only the runs of this round share."""
    environment = {**os.environ, "BADAM_CACHE_DIR": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    begin = time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()

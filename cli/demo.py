"""``make demo``: the three commands as a user types them, from a plan for a card to predicted against measured."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMANDS = {"badam-plan": "badam_cli.plan", "badam-train": "badam_cli.train", "badam-report": "badam_cli.report"}

MODEL = "badam/demo-llama-12m"
"""A Llama of 12 million parameters with random weights; its data are docstrings of Python's standard library."""

SCRIPT = (
    (
        "What would it take to fine-tune all of Llama 2-7B on a 24 GB card?",
        "badam-plan meta-llama/Llama-2-7b-hf --gpu rtx3090 --output llama-2-7b.json",
    ),
    (
        "The same for a model that this machine's processor can train.",
        (
            f"badam-plan {MODEL} --gpu cpu --batch-size 4 --seq-len 128 --partition layer --include-embedding "
            "--include-lm-head --switch-every 4 --learning-rate 3e-3 --output plan.json"
        ),
    ),
    (
        "Run that plan: ten blocks, four visits of four steps to each.",
        "badam-train --plan plan.json --output-dir run --max-steps 160 --pad-to plan",
    ),
    ("Was the prediction right?", "badam-report plan.json run/measured.json"),
)


def main() -> None:
    """Run the commands in a new directory, each shown before it runs; end at the first that fails."""
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="badam-demo-"))
    directory.mkdir(parents=True, exist_ok=True)
    # So small a model gains little from a second thread, and waits for it long where the machine is busy.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    begun = time.monotonic()
    for purpose, command in SCRIPT:
        print(f"\n# {purpose}\n$ {command}", flush=True)
        name, *arguments = shlex.split(command)
        # By module, so that the demo also runs where the console scripts are not on the path.
        module = [sys.executable, "-m", COMMANDS[name]]
        result = subprocess.run([*module, *arguments], cwd=directory, env=environment, check=False)
        if result.returncode:
            sys.exit(result.returncode)
    print(f"\nEverything is in {directory}. It took {time.monotonic() - begun:.0f} s.")


if __name__ == "__main__":
    main()

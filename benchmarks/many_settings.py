"""How long it takes to ask about a hundred settings of one model: 36 sizes, three partitions.

Each round is a process of its own, in which torch and transformers are loaded before the clock starts. The settings
checkpoint all layers and make full logits; of each the worst block is found, as for a map of what fits.

    python -m benchmarks.many_settings --rounds 3 --output benchmarks/results/many_settings.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice, product
from pathlib import Path

from badam.vocabulary import Strategy

MODEL, GPU = "meta-llama/Llama-2-7b-hf", "rtx3090"
BATCHES, LENGTHS = (1, 2, 3, 4, 6, 8), (256, 512, 768, 1024, 1536, 2048)
PARTITIONS: tuple[Strategy, ...] = ("layer", "attn-mlp", "matrix")
SETTINGS = 100
WORKERS = (1, 2)


def main() -> None:
    """Ask with each number of worker processes in turns and report medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--ask", type=int, metavar="WORKERS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ask is not None:
        print(json.dumps(ask_all(arguments.ask)))
        return
    taken: dict[int, list[dict[str, float]]] = {workers: [] for workers in WORKERS}
    for round_number in range(arguments.rounds):
        for workers in WORKERS:
            command = [sys.executable, "-m", "benchmarks.many_settings", "--ask", str(workers)]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            taken[workers].append(json.loads(found.splitlines()[-1]))
        print(f"round {round_number + 1} of {arguments.rounds}", file=sys.stderr)
    medians = {
        f"{workers} of {os.cpu_count()} CPUs": {name: statistics.median(one[name] for one in each) for name in each[0]}
        for workers, each in taken.items()
    }
    for name, numbers in medians.items():
        print(f"{numbers['seconds']:8.2f} s, {numbers['processor_seconds']:.2f} s of processors: {name}")
    record = {
        "settings": SETTINGS,
        "model": MODEL,
        "medians": medians,
        "rounds": arguments.rounds,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {name: version(name) for name in ("badam", "torch", "transformers")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def ask_all(workers: int) -> dict[str, float]:
    """Wall and processor seconds, those of the forks included, of the module tree and all answers."""
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401 - loaded before the clock starts

    from badam_planner.rehearsal.evaluator import Evaluator
    from badam_planner.rehearsal.model_tree import inspect_model
    from badam_planner.search.model_spec import describe_model
    from badam_planner.search.planner import Request, staged_plan
    from badam_planner.search.settings import MemorySetting
    from badam_planner.sources.target import find_target

    torch.set_num_threads(1)
    gc.disable()  # as the command does
    spec, target = describe_model(MODEL), find_target(GPU)
    begin, processors = time.perf_counter(), _processor_seconds()
    evaluator = Evaluator(inspect_model(spec, "sdpa"), workers=workers)
    evaluator.expect_sizes(BATCHES, LENGTHS)
    for batch, length, partition in islice(product(BATCHES, LENGTHS, PARTITIONS), SETTINGS):
        request = Request(spec=spec, target=target, batch_size=batch, seq_len=length)
        evaluator.worst_block(staged_plan(request, partition, MemorySetting("all", "full"), evaluator.tree))
    return {"seconds": time.perf_counter() - begin, "processor_seconds": _processor_seconds() - processors}


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    main()

"""Host memory of each process while it builds a model for FSDP2: its part, or the whole, of which it keeps a part.

    python -m benchmarks.host_memory        # writes a table to stdout

Private memory (RssAnon of /proc/self/status, looked at every 2 ms), less that before. Pretrained weights are float16,
as those of Llama 2 are, and the plan's type is bfloat16; the files are mapped, which counts for no process.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from badam.distributed import shard_blocks
from badam.distributed.fsdp2 import mesh_of
from badam.distributed.fsdp2_init import ShardedModelBuilder
from badam.plan import ModelSpec, Training, config_digest
from badam.training.build import build_model

MIB = 2**20
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 16384,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 14,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
TRAINING = Training(batch_size=1, seq_len=16)


def private_bytes() -> int:
    """Memory of this process that no other has, as the kernel counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@contextmanager
def highest() -> Iterator[list[int]]:
    """A list that gets the most private memory of the block, less that before it."""
    gc.collect()
    before, seen, ends = private_bytes(), [0], threading.Event()

    def look() -> None:
        while not ends.is_set():
            seen[0] = max(seen[0], private_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=look)
    watcher.start()
    found: list[int] = []
    try:
        yield found
    finally:
        ends.set()
        watcher.join()
        found.append(max(0, seen[0] - before))


def in_parts(spec: ModelSpec, weights: str | None) -> Any:
    """The model as badam-train builds it."""
    mesh, host = mesh_of(dist.get_world_size()), torch.device("cpu")
    return build_model(spec, TRAINING, weights=weights, builder=lambda kind: ShardedModelBuilder(kind, mesh, host))


def whole_then_cut(spec: ModelSpec, weights: str | None) -> Any:
    """The model as a loop of one's own builds it."""
    return shard_blocks(build_model(spec, TRAINING, weights=weights))


WAYS: dict[str, Callable[[ModelSpec, str | None], Any]] = {"whole": whole_then_cut, "parts": in_parts}


def measure(spec: ModelSpec, weights: str | None, way: str) -> None:
    """Build in this one of the processes that torchrun has started; the first prints what the largest one took."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    with highest() as found:
        model = WAYS[way](spec, weights)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, found[0])
    if dist.get_rank() == 0:
        print(max(every), sum(1 for _ in model.parameters()))
    dist.barrier()
    dist.destroy_process_group()


def in_fresh_processes(processes: int, *options: str) -> int:
    """What :func:`measure` printed: memory that was freed before would be counted as none."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", "benchmarks.host_memory", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(result.stdout.splitlines()[-1].split()[0])


def main() -> None:
    """Print the table; of the processes that it starts each measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--weights")
    given = parser.parse_args()
    config = {**CONFIG, "num_hidden_layers": given.layers}
    spec = ModelSpec(id="llama", source="config", config=config, config_digest=config_digest(config), parameters=1)
    if given.way is not None:
        measure(spec, given.weights, given.way)
        return
    with tempfile.TemporaryDirectory() as directory:
        model = build_model(spec, TRAINING)
        entries = sum(parameter.numel() for parameter in model.parameters())
        model.half().save_pretrained(directory)
        print(
            f"{entries / 1e6:.0f} M parameters in bfloat16, {2 * entries / MIB:.0f} MiB, {given.processes} processes:"
        )
        print("\n| weights | whole, then cut | in parts |\n|---|---:|---:|")
        for kind, source in (("random", ()), ("pretrained", ("--weights", directory))):
            options = ("--layers", str(given.layers), *source)
            most = (in_fresh_processes(given.processes, "--way", way, *options) for way in WAYS)
            print(f"| {kind} | {' | '.join(f'{size / MIB:.0f} MiB' for size in most)} |", flush=True)


if __name__ == "__main__":
    main()

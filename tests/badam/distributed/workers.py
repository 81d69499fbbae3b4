"""Run a function on several gloo processes, each a fresh interpreter, and bring back what it returned."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
TIMEOUT_SECONDS = 120

_BOOT = """if True:
    import datetime, importlib, os, pickle, sys
    import torch
    import torch.distributed as dist
    torch.set_num_threads(1)
    module, target, arguments, out = sys.argv[1:5]
    jobs = importlib.import_module(module)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=40))
    with open(arguments, "rb") as file:
        given = pickle.load(file)
    result = getattr(jobs, target)(**given)
    with open(f"{out}.{dist.get_rank()}", "wb") as file:
        pickle.dump(result, file)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may still be there, and an interpreter that takes itself apart under them aborts
"""


class JobFailedError(AssertionError):
    """At least one process did not end with 0; ``errors`` holds what each said last."""

    def __init__(self, codes: Sequence[int | None], errors: Sequence[str]) -> None:
        super().__init__(f"exit codes {list(codes)}\n" + "\n---\n".join(error[-3000:] for error in errors))
        self.codes = codes
        self.errors = errors


def on_ranks(count: int, job: Callable[..., Any], **arguments: Any) -> list[Any]:
    """What ``job(**arguments)``, a function of a module, returned on each of ``count`` processes."""
    with tempfile.TemporaryDirectory() as directory:
        given, out = Path(directory, "arguments"), Path(directory, "result")
        given.write_bytes(pickle.dumps(arguments))
        command = [sys.executable, "-W", "ignore", "-c", _BOOT, job.__module__, job.__name__, str(given), str(out)]
        processes = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=rank_environment(rank, count, port),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for port in [free_port()]
            for rank in range(count)
        ]
        try:
            errors = [process.communicate(timeout=TIMEOUT_SECONDS)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(process.returncode for process in processes):
            raise JobFailedError([process.returncode for process in processes], errors)
        return [pickle.loads(Path(f"{out}.{rank}").read_bytes()) for rank in range(count)]


def rank_environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun would set."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(ROOT),
    }


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])

"""Run a function on several gloo processes, each a fresh interpreter, and bring back what it returned."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
TIMEOUT_SECONDS = 300

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


Requests = dict[str, tuple[Callable[..., Any], dict[str, Any]]]
"""By name: a function of a module and its keyword arguments."""


def one_after_another(requests: Requests) -> dict[str, Any]:
    """Several jobs in the same processes, because starting processes takes longer than most jobs do.

    What one of them raises takes the place of its result.
    """
    results: dict[str, Any] = {}
    for name, (job, settings) in requests.items():
        try:
            results[name] = job(**settings)
        except Exception:
            results[name] = AssertionError(traceback.format_exc())
    return results


def results_of(count: int, requests: Requests) -> list[dict[str, Any]]:
    """The results of ``requests`` on each of ``count`` processes; raises the first failure."""
    on_each = on_ranks(count, one_after_another, requests=requests)
    for results in on_each:
        for result in results.values():
            if isinstance(result, AssertionError):
                raise result
    return on_each

"""Runs cases in forked processes, two at a time, each in an empty directory with caches of its own."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

Case = Callable[[], Any]
"""Returns what is recorded, in plain JSON values."""

PROCESSES = 2
MODELS = (
    "bert", "bloom", "falcon", "gemma2", "gpt2", "gpt_neox", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3",
    "qwen3_moe",
)  # fmt: skip
"""Modelling files of transformers that most cases need."""
LOG, RESULT = "log.txt", "result.json"


class CaseFailed(Exception):
    """A case ended without an answer."""


def import_libraries() -> None:
    """Load once, in the parent, what every case would spend seconds on; no tensor is made."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.set_num_threads(1)  # before the first operation: threads do not survive a fork
    for name in MODELS:
        import_module(f"transformers.models.{name}.modeling_{name}")


def run_all(cases: Mapping[str, Case], processes: int = PROCESSES) -> dict[str, Any]:
    """The results of all cases, by name and in the order of ``cases``.

    A process that serves a single case knows nothing of the others, so a result does not depend on which were run
    before. Each has one processor core, so that the planner makes no processes of its own.

    Raises:
        CaseFailed: if a case raised or its process was killed; the others are given up.
    """
    waiting = list(cases)
    free = list(range(processes))
    running: dict[int, tuple[str, int, Path, float]] = {}
    results: dict[str, Any] = {}
    try:
        while waiting or running:
            while waiting and free:
                name, slot = waiting.pop(0), free.pop()
                folder = Path(tempfile.mkdtemp(prefix="badam-unchanged-"))
                running[_fork(cases[name], slot, folder)] = (name, slot, folder, time.monotonic())
            child, _ = os.waitpid(-1, 0)
            if child not in running:  # one that somebody else in this process began
                continue
            name, slot, folder, begun = running.pop(child)
            free.append(slot)
            results[name] = _result(name, folder)
            seconds = time.monotonic() - begun
            print(f"{len(results)}/{len(cases)} {name} ({seconds:.1f} s)", file=sys.stderr, flush=True)
    finally:
        for child, (_, _, folder, _) in running.items():
            with suppress(ProcessLookupError):
                os.kill(child, 9)
            os.waitpid(child, 0)
            shutil.rmtree(folder, ignore_errors=True)
    return {name: results[name] for name in cases}


def _fork(case: Case, slot: int, folder: Path) -> int:
    """The number of the process that runs ``case``; it never returns here."""
    child = os.fork()
    if child:
        return child
    try:
        os.chdir(folder)
        if hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[slot % len(cores)]})
        os.environ["BADAM_CACHE_DIR"] = str(folder / "cache")
        os.environ["BADAM_DATA_DIR"] = str(folder / "data")  # with no calibration from measured runs
        log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        text = json.dumps(case())
        (folder / RESULT).write_text(text, encoding="utf-8")
    except BaseException:
        with (folder / LOG).open("a", encoding="utf-8") as complaint:
            traceback.print_exc(file=complaint)
    finally:
        os._exit(0)  # what the parent would do on leaving is not ours to do


def _result(name: str, folder: Path) -> Any:
    try:
        return json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except OSError as error:
        said = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip()
        raise CaseFailed(f"{name} ended without an answer:\n{said or 'it said nothing'}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)

"""The files of a run that was continued from its checkpoint: every tensor of weights and state as a digest."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.recorded.forks import Case
from benchmarks.recorded.plain import without

METHODS = {"badam": ("--partition", "attn-mlp"), "badam-ratio": ("--update-ratio", "0.3")}
MODEL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 320, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WORDS = ("sun", "moon", "star", "tree", "river", "stone")
VISIT, SAVED, STEPS = 3, 7, 12
"""Steps of a visit, until the checkpoint, which is in the middle of a visit, and of the whole run."""

TIMES = {"step_seconds", "seconds_by_phase", "backward_seconds", "tokens_per_second"}
ABOUT_THE_RUN = {"provenance", "machine", "plan_digest"}  # date and versions; the plan's digest has its date in it
MEASURED_BYTES = {
    "live_bytes", "peak_bytes", "peak_allocated_bytes", "by_category", "by_phase", "peak_by_phase", "peak_phase",
}  # fmt: skip
"""Vary from run to run by a scalar of Hugging Face's loop or two; the part ``cpu`` compares them, but for so many."""
STATE_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def cases() -> dict[str, Case]:
    """One for each of the project's own optimizers."""
    return {method: partial(interrupted, method) for method in METHODS}


def interrupted(method: str) -> dict[str, Any]:
    """Train to the checkpoint, continue to the end, and describe what lies there then."""
    Path("model.json").write_text(json.dumps(MODEL), encoding="utf-8")
    rows = [
        {"prompt": f"say {WORDS[number % 6]} ", "completion": " ".join(WORDS[: 1 + number % 5])} for number in range(24)
    ]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command(
        "plan", "model.json", "--gpu", "cpu", "--gpu-memory", "16GiB", "--batch-size", "2", "--seq-len", "16",
        "--method", method, "--switch-every", str(VISIT), "--learning-rate", "1e-3", *METHODS[method],
    )  # fmt: skip
    run = ("train", "--plan", "plan.json", "--init", "random", "--data", "data.jsonl", "--output-dir", "run")
    schedule = ("--lr-scheduler", "constant", "--save-steps")
    command(*run, *schedule, str(SAVED), "--max-steps", str(SAVED))
    command(*run, *schedule, str(STEPS), "--max-steps", str(STEPS), "--resume")
    return described(Path("run"))


def command(name: str, *arguments: str) -> None:
    """One of the project's commands in a process of its own, as a user would continue a run."""
    # By the processor's instructions oneDNN chooses kernels, and with them the rounding of sums.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    code = [sys.executable, "-m", f"badam_cli.{name}", *arguments]
    done = subprocess.run(code, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"badam-{name} {' '.join(arguments)}: exit code {done.returncode}; {done.stderr}")


def described(run: Path) -> dict[str, Any]:
    """The files of a run directory: tensors as digests by name, text less times."""
    import torch

    files: dict[str, Any] = {"files": sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())}
    for path in sorted(run.rglob("*.safetensors")):
        files[str(path.relative_to(run))] = _weights(path)
    for path in sorted(path for name in STATE_FILES for path in run.rglob(name)):
        content = torch.load(path, weights_only=False)
        files[str(path.relative_to(run))] = dict(_leaves(content))
    for path in sorted(run.rglob("trainer_state.json")):
        files[str(path.relative_to(run))] = without(json.loads(path.read_text(encoding="utf-8")), TIMES)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    files["metrics.jsonl"] = [without(json.loads(line), TIMES | MEASURED_BYTES) for line in lines]
    measured = json.loads((run / "measured.json").read_text(encoding="utf-8"))
    files["measured.json"] = without(measured, TIMES | ABOUT_THE_RUN | MEASURED_BYTES)
    return files


def _weights(path: Path) -> dict[str, str]:
    from safetensors.torch import load_file

    return {name: _tensor(tensor) for name, tensor in sorted(load_file(path).items())}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """What a saved state holds, by its place in it."""
    import numpy
    import torch

    if isinstance(value, torch.Tensor):
        yield path, _tensor(value)
    elif isinstance(value, numpy.ndarray):
        yield path, _tensor(torch.from_numpy(value))
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}/{key}")
    elif isinstance(value, list | tuple) and len(value) <= 64:
        for place, inner in enumerate(value):
            yield from _leaves(inner, f"{path}/{place}")
    else:  # numbers, names, and the hundreds of words of a random generator
        text = repr(value)
        yield path, text if len(text) <= 80 else hashlib.sha256(text.encode()).hexdigest()[:16]


def _tensor(tensor: Any) -> str:
    """Type, shape and a digest of the bytes."""
    import torch

    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(content).hexdigest()[:16]}"

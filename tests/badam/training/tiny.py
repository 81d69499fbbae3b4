"""A plan, records and a run small enough for a test: two to four optimizer steps take a second."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from badam.plan import (
    BlockPlan,
    ModelSpec,
    OptimizerSpec,
    Partition,
    Plan,
    Provenance,
    Schedule,
    Target,
    Training,
    config_digest,
)
from badam.training.options import RunOptions
from badam.training.run import RunResult, run_plan

VOCABULARY, LAYERS = 320, 3
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_plan(
    *,
    model: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    schedule: dict[str, Any] | None = None,
    checkpointed: bool = False,
    **changes: Any,
) -> Plan:
    """A plan without prediction: blocks by layer, ascending, two steps each."""
    blocks = tuple(
        BlockPlan(
            name=f"layer {index}",
            prefixes=(f"model.layers.{index}",),
            parameters=1,
            checkpointed_layers=tuple(f"model.layers.{layer}" for layer in range(LAYERS)) if checkpointed else (),
        )
        for index in range(LAYERS)
    )
    spec = {
        "id": "badam/tiny",
        "source": "catalogue",
        "config": CONFIG,
        "config_digest": config_digest(CONFIG),
        "parameters": 1,
    }
    fields: dict[str, Any] = {
        "model": ModelSpec.model_validate({**spec, **(model or {})}),
        "target": Target(gpu="cpu", total_bytes=2**34, usable_bytes=2**34),
        "partition": Partition(strategy="layer", blocks=blocks),
        "schedule": Schedule(**{"switch_mode": "ascending", "switch_every": 2, **(schedule or {})}),
        "training": Training(
            **{"batch_size": 2, "seq_len": 16, "checkpointing": "none", **(training or {})},
            optimizer=OptimizerSpec(**{"learning_rate": 1e-3, **(optimizer or {})}),
        ),
        "provenance": Provenance(versions={}, command="test", date="2026-01-01T00:00:00Z"),
        **changes,
    }
    return Plan(**fields)


def records(count: int = 24) -> list[dict[str, str]]:
    """Prompt/completion pairs of different lengths."""
    words = ["sun", "moon", "star", "tree", "river", "stone"]
    return [
        {"prompt": f"say {words[index % 6]} ", "completion": " ".join(words[: 1 + index % 5])} for index in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_tiny(plan: Plan, directory: Path, *, output: str = "run", **options: Any) -> tuple[RunResult, str]:
    """Run ``plan`` on :func:`records`; returns the result and what was printed."""
    data = directory / "data.jsonl"
    if not data.exists():
        write_jsonl(data, records())
    printed = io.StringIO()
    settings: dict[str, Any] = {"data": str(data), "max_steps": 4, "output_dir": directory / output, **options}
    result = run_plan(plan, RunOptions(**settings), Console(file=printed, width=200), command="test")
    return result, printed.getvalue()

"""A model of some ten thousand parameters, cases on it, and records as a card would leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from badam.plan import Plan, Target
from badam.profiling.record import Machine
from badam.units import GIB, MIB
from benchmarks.gpu.cases import Case
from benchmarks.gpu.record import CaseRecord, DeviceAccount

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 320, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
GEMMA2: dict[str, Any] = {
    "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "vocab_size": 96, "hidden_size": 32,
    "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16,
    "num_hidden_layers": 8,
}  # fmt: skip
CPU = Target(gpu="cpu", total_bytes=2**40, usable_bytes=2**40)
GPU = Target(gpu="h200", total_bytes=140 * GIB, usable_bytes=139 * GIB, context_bytes=512 * MIB, workspace_bytes=MIB)
GPU_MACHINE = Machine(
    device="cuda", device_name="NVIDIA H200", device_total_bytes=139 * GIB, cpu_count=16, platform="Linux x86_64"
)


def write_model(directory: Path, config: dict[str, Any] = LLAMA) -> str:
    """The path of a configuration file."""
    path = directory / "tiny.json"
    path.write_text(json.dumps(config))
    return str(path)


def case(model: str, **settings: Any) -> Case:
    """A case of two sequences of 16 tokens, one block epoch."""
    return Case(**{"model": model, "batch_size": 2, "seq_len": 16, "block_epochs": 1, **settings})


def as_on_a_gpu(record: CaseRecord, *, reserved: int, device: int, source: str = "NVML, this process") -> CaseRecord:
    """A record of a CPU run with the figures that a card would add."""
    assert record.run is not None
    measurement = record.run.measurement.model_copy(
        update={"peak_reserved_bytes": reserved, "peak_device_bytes": device}
    )
    account = DeviceAccount(
        allocated_bytes=0, reserved_bytes=reserved, nvml_bytes=device, nvml_source=source,
        cuda_used_bytes=reserved + 400 * MIB,
    )  # fmt: skip
    run = record.run.model_copy(update={"measurement": measurement, "machine": GPU_MACHINE})
    return record.model_copy(update={"run": run, "machine": GPU_MACHINE, "account": account})


def without_prediction(plan: Plan) -> Plan:
    return plan.model_copy(update={"prediction": None})

"""Sixty plans as badam-plan prints them: every method, fourteen families, four engines, a CPU and several cards."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cpu.cases import ARCHITECTURES
from benchmarks.cpu.run import command
from benchmarks.recorded.forks import Case
from benchmarks.recorded.plain import without

LEFT_OUT = {
    "provenance",  # versions, command line and date
    "config_digest",  # follows from the configuration, which is recorded
}
FITS, DOES_NOT_FIT = 0, 1

PLANS = (
    # One card, by method.
    "Llama-2-7B --gpu rtx3090",
    "Llama-2-7B --gpu rtx3090 --batch-size 8 --seq-len 728 --checkpointing all --loss full --attention eager",
    "Llama-2-7B --gpu rtx3090 --batch-size 2 --seq-len 1024 --partition attn-mlp --switch-mode ascending",
    "Llama-3.2-3B --gpu rtx3090 --grad-accum 4 --partition matrix --loss chunked",
    "Llama-3-8B --gpu rtx3090 --batch-size 2 --seq-len 728 --partition layer --seed 3",
    "Llama-3-8B --gpu a100-80gb --batch-size 8 --seq-len 2048 --include-embedding --include-lm-head",
    "Llama-3-8B --gpu h100-sxm --batch-size 4 --seq-len 4096 --expandable-segments on --samples 50000 --epochs 3",
    "Llama-3-8B --gpu rtx3090 --batch-size 2 --seq-len 728 --method badam-ratio --update-ratio 0.05",
    "Llama-3-8B --gpu a100-80gb --method adam",
    "Llama-3-8B --gpu rtx3090 --batch-size 2 --seq-len 728 --method lora --rank 8",
    "Llama-3-8B --gpu a100-80gb --method lora --target-module q_proj --target-module v_proj --alpha 16 --grad-accum 2",
    "Llama-3-8B --gpu rtx3090 --batch-size 4 --seq-len 1024 --method qlora --rank 16",
    "Llama-3-8B --gpu rtx3090 --batch-size 2 --seq-len 728 --method lomo",
    "Llama-2-7B --gpu rtx3090 --batch-size 1 --seq-len 512 --method adalomo --checkpointing none",
    "Llama-3.2-1B --gpu rtx3090 --batch-size 4 --method galore --rank 64",
    "Llama-2-7B --gpu a100-80gb --batch-size 2 --method lisa --sampled-layers 4",
    "Llama-2-7B --gpu rtx3090 --batch-size 2 --method hift --partition attn-mlp",
    "Llama-3-8B --gpu rtx3090 --batch-size 8 --method mezo",
    # One card, by family of models.
    "Qwen3-0.6B --gpu rtx3090 --batch-size 8 --seq-len 1024 --method adam",
    "Qwen2.5-7B --gpu rtx3090 --batch-size 1 --seq-len 2048 --switch-every 20",
    "Qwen3-30B-A3B --gpu a100-80gb --seq-len 256 --partition layer",
    "Mixtral-8x7B --gpu h200 --seq-len 256 --method lomo",
    "google/gemma-2-2b --gpu rtx3090 --batch-size 2 --seq-len 512 --checkpointing none",
    "google/gemma-2-9b --gpu a100-80gb --batch-size 1 --seq-len 1024 --method badam-ratio",
    "Phi-3-mini --gpu rtx3090 --batch-size 2 --seq-len 1024 --loss chunked",
    "Mistral-7B --gpu rtx3090 --batch-size 1 --seq-len 4096 --active-module model.norm",
    "gpt2 --gpu t4 --batch-size 16 --seq-len 512 --dtype float16 --method adam",
    "gpt2 --gpu rtx3090 --batch-size 8 --method galore --dtype float32",
    "flan-t5-xl --gpu rtx3090 --batch-size 2 --seq-len 256 --decoder-len 64",
    "t5-base --gpu rtx3090 --batch-size 8 --method lisa",
    "whisper-small --gpu rtx3090 --batch-size 8",
    "vit-base --gpu rtx3090 --batch-size 32 --num-labels 1000",
    "bert-base --gpu t4 --batch-size 32 --seq-len 128 --method hift",
    "roberta-large --gpu rtx3090 --batch-size 16 --seq-len 256 --num-labels 5",
    "Llama-2-13B --gpu rtx3090 --gpu-memory 16GiB",
    # Several cards.
    "Llama-2-7B --gpu rtx3090 --engine ddp --num-gpus 4 --batch-size 2",
    "Llama-3.2-1B --gpu a100-80gb --engine ddp --num-gpus 2 --partition matrix --grad-accum 2 --loss full",
    "Qwen3-0.6B --gpu rtx3090 --engine ddp --num-gpus 2 --loss chunked --include-embedding",
    "google/gemma-2-2b --gpu h200 --engine ddp --num-gpus 16 --seq-len 256 --partition layer",
    "Llama-2-70B --gpu a100-80gb --engine fsdp2 --num-gpus 8 --partition layer --checkpointing all --loss full",
    "Llama-3-8B --gpu rtx3090 --engine fsdp2 --num-gpus auto --batch-size 2 --seq-len 728",
    "Llama-3-8B --gpu rtx3090 --engine fsdp2 --num-gpus 8 --shard-size 4 --partition attn-mlp",
    "Llama-2-13B --gpu rtx3090 --engine fsdp2 --num-gpus 8 --shard-size auto --grad-accum 2 --partition layer",
    "Llama-3-8B --gpu h100-sxm --engine fsdp2 --num-gpus 4 --seq-len 4096 --checkpointing all",
    "Qwen3-0.6B --gpu rtx3090 --engine fsdp2 --num-gpus 4 --partition matrix --checkpointing none --loss full",
    "Qwen3-8B --gpu a100-80gb --engine fsdp2 --num-gpus 2 --include-embedding --include-lm-head --partition layer",
    "Llama-3.2-1B --gpu rtx3090 --engine fsdp2 --num-gpus 2 --dtype float32",
    "Llama-3-8B --gpu rtx3090 --engine zero3 --num-gpus 4 --batch-size 2",
    "Llama-2-70B --gpu a100-80gb --engine zero3 --num-gpus 16 --gpus-per-node 4 --partition layer --checkpointing all",
    "Llama-2-13B --gpu rtx3090 --engine zero3 --num-gpus 2 --offload all --partition layer",
    "Llama-3-8B --gpu a100-80gb --engine zero3 --num-gpus 4 --offload optimizer --grad-accum 2 --partition attn-mlp",
    "Qwen2.5-0.5B --gpu rtx3090 --engine zero3 --num-gpus 2 --checkpointing none",
    # This machine; a name that ends with .json is one of benchmarks.cpu.cases.
    "demo --gpu cpu --batch-size 4 --seq-len 128 --switch-every 4",
    "demo --gpu cpu --batch-size 2 --seq-len 64 --method badam-ratio --exact",
    "opt.json --gpu cpu --batch-size 2 --seq-len 64 --method mezo",
    "falcon.json --gpu cpu --batch-size 2 --seq-len 128 --partition matrix --checkpointing all",
    "bloom.json --gpu cpu --batch-size 3 --seq-len 32 --method lora",
    "gpt_neox.json --gpu cpu --batch-size 2 --seq-len 64 --method galore --rank 8 --dtype float32",
    "qwen3_moe.json --gpu cpu --batch-size 2 --seq-len 96 --partition attn-mlp --loss chunked",
    "mistral.json --gpu cpu --batch-size 1 --seq-len 80 --method adalomo --loss full --checkpointing all",
)

CPU_MEMORY = ("--gpu-memory", "16GiB")
"""What is free on this machine differs from moment to moment, so on a CPU it is given."""


def cases() -> dict[str, Case]:
    """One for each plan, named by its options."""
    return {options: partial(ask, options.split()) for options in PLANS}


def ask(options: list[str]) -> dict[str, Any]:
    """What badam-plan answers: its exit code and the plan, or the sentence that refuses one."""
    model, on_cpu = Path(options[0]), "cpu" in options
    if model.suffix == ".json":
        model.write_text(json.dumps(ARCHITECTURES[model.stem]), encoding="utf-8")
    code, printed, said = command("plan", *options, *(CPU_MEMORY if on_cpu else ()), "--json")
    if code not in (FITS, DOES_NOT_FIT):
        raise ValueError(f"badam-plan {' '.join(options)}: exit code {code}; {said}")
    if code == DOES_NOT_FIT:
        return {"exit code": code, "said": said}
    plan = without(json.loads(printed), LEFT_OUT)
    if on_cpu:
        del plan["target"]["total_bytes"]  # the machine's own
    return {"exit code": code, "plan": plan}

"""Time of backward with one block active against all blocks active, activation checkpointing on.

Three ways of checkpointing an 8-layer Llama: the block-aware one, transformers' own with the embedding hook that it
installs, and transformers' own made block-aware. Prints JSON, or writes it with ``--output``.

    python -m benchmarks.checkpointing_backward --output checkpointing.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from badam.checkpointing import checkpoint_layers, enable_for_transformers

LAYERS = 8


def build(hidden: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_attention_heads=hidden // 32,
        num_hidden_layers=LAYERS,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).train()


def activate(model: nn.Module, prefix: str) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefix))


def backward_seconds(model: nn.Module, tokens: torch.Tensor) -> float:
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=tokens, labels=tokens).loss
    begin = time.perf_counter()
    loss.backward()
    return time.perf_counter() - begin


def block_aware(model: nn.Module) -> None:
    checkpoint_layers(model, [f"model.layers.{index}" for index in range(LAYERS)])


def embedding_hook(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})


def hook_removed(model: nn.Module) -> None:
    embedding_hook(model)
    enable_for_transformers(model)


WAYS: dict[str, Callable[[nn.Module], None]] = {
    "block-aware": block_aware,
    "transformers, embedding hook": embedding_hook,
    "transformers, made block-aware": hook_removed,
}


def measure(hidden: int, tokens: torch.Tensor, repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds per way and active part; the parts alternate, so that a busy machine slows both."""
    results: dict[str, dict[str, float]] = {}
    for name, enable in WAYS.items():
        model = build(hidden)
        enable(model)
        seconds: dict[str, list[float]] = {"model.layers.": [], f"model.layers.{LAYERS - 1}.": []}
        for repeat in range(repeats + 1):
            for prefix, record in seconds.items():
                activate(model, prefix)
                elapsed = backward_seconds(model, tokens)
                if repeat:  # the first is a warm-up
                    record.append(elapsed)
        every, top = (statistics.median(record) for record in seconds.values())
        results[name] = {"all_seconds": every, "top_seconds": top, "ratio": top / every}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hidden", type=int, default=256, help="hidden size; a multiple of 32")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokens = torch.randint(0, 512, (options.batch, options.length), generator=torch.Generator().manual_seed(0))
    record = {
        "what": f"backward of a {LAYERS}-layer bf16 Llama, checkpointing on: only the top layer active / all layers",
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": options.threads},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "results": measure(options.hidden, tokens, options.repeats),
    }
    text = json.dumps(record, indent=2)
    if options.output is None:
        print(text)
    else:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

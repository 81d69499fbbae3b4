"""What the processes of the tests of checkpoints run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from badam.distributed import load_checkpoint, save_checkpoint, save_whole_model, shard_blocks
from badam.errors import InputError, StateError
from tests.badam.distributed.small_training import SAVED_AT, THREE_EPOCHS, Run, make, train, weights, whole


def save(path: str, how: str = "fsdp", dtype: str = "float32") -> Run:
    """Train, save in the middle of a visit, train on: the losses and weights that a resumed run must have."""
    model, optimizer = make(how, dtype)
    train(model, optimizer, SAVED_AT)
    save_checkpoint(path, model, optimizer)
    losses = train(model, optimizer, THREE_EPOCHS)
    return losses, weights(model)


def resume(path: str, how: str = "fsdp", dtype: str = "float32") -> Run:
    model, optimizer = make(how, dtype)
    train(model, optimizer, 1)  # not where it was saved
    load_checkpoint(path, model, optimizer)
    assert (optimizer.global_step, optimizer.steps_in_visit) == (SAVED_AT, 2)
    return train(model, optimizer, THREE_EPOCHS), weights(model)


def checkpoint_refusals(path: str) -> dict[str, str]:
    """Messages for a checkpoint that is there, is not, is not whole, or is of another partition."""
    model, optimizer = make("fsdp")
    other = make("fsdp", block_prefix_list=[["layers.0"], ["layers.1", "layers.2"]])
    partial = Path(path).with_name("partial")
    partial.mkdir(exist_ok=True)
    attempts: dict[str, Callable[[], Any]] = {
        "there": lambda: save_checkpoint(path, model, optimizer),
        "missing": lambda: load_checkpoint(path + "-none", model, optimizer),
        "partial": lambda: load_checkpoint(partial, model, optimizer),
        "partition": lambda: load_checkpoint(path, *other),
        "not transformers": lambda: save_whole_model(path + "-model", model),
    }
    messages = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except (InputError, StateError) as error:
            messages[name] = str(error)
    return messages


def whole_model(path: str) -> dict[str, Tensor]:
    """A sharded Llama written for from_pretrained; returns its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).to(torch.bfloat16)
    shard_blocks(model)
    save_whole_model(path, model)
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def steps_in(path: str) -> int:
    """The step at which a checkpoint was taken, once it is loaded."""
    model, optimizer = make("fsdp")
    load_checkpoint(path, model, optimizer)
    return optimizer.global_step

"""What the processes of the tests of building models in parts run."""

from __future__ import annotations

import gc
import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaModel, LlamaPreTrainedModel, set_seed

from badam.distributed import shard_blocks
from badam.distributed.fsdp2 import mesh_of
from badam.distributed.fsdp2_init import ShardedModelBuilder
from badam.errors import InputError
from badam.plan import ModelSpec, Training
from badam.profiling.memory.cpu_allocator_log import AllocatorLog
from badam.training.build import build_model

HOST = torch.device("cpu")


def built(spec: str, training: str, weights: str | None, shard_size: int) -> dict[str, Any]:
    """A model that was built in parts with a seed, put together again, and what the generator draws next."""
    set_seed(3)
    whole: list[nn.Module] = []
    usual = ShardedModelBuilder._shard_whole
    ShardedModelBuilder._shard_whole = lambda builder, model: whole.append(model) or usual(builder, model)  # type: ignore[method-assign,func-returns-value]
    try:
        model = in_parts(spec, training, weights, shard_size)
    except InputError as error:
        return {"refused": error.message}
    finally:
        ShardedModelBuilder._shard_whole = usual  # type: ignore[method-assign]
    drawn = torch.rand(3)
    weights_of = {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = {"weights": weights_of, "buffers": buffers, "drawn": drawn, "names": all_names(model)}
    return {**found, "built whole": bool(whole)}


def every_one(models: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """:func:`built` for each of ``models``."""
    return {name: built(**settings) for name, settings in models.items()}


def in_parts(spec: str, training: str, weights: str | None, shard_size: int) -> Any:
    mesh = mesh_of(shard_size)
    return build_model(
        ModelSpec.model_validate_json(spec),
        Training.model_validate_json(training),
        weights=weights,
        builder=lambda model_class: ShardedModelBuilder(model_class, mesh, HOST),
    )


def all_names(model: nn.Module) -> dict[str, list[str]]:
    """The other names of each shared parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {first: others for first, *others in names.values() if others}


def alone(spec: str, training: str, weights: str | None) -> dict[str, Any]:
    """What one process builds."""
    set_seed(3)
    model = build_model(ModelSpec.model_validate_json(spec), Training.model_validate_json(training), weights=weights)
    drawn = torch.rand(3)
    parameters: dict[str, Tensor] = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {"weights": parameters, "buffers": dict(model.named_buffers()), "drawn": drawn, "names": all_names(model)}


def highest_bytes(models: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    """:func:`most_held` for each of ``models``, built in parts and built whole."""
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # what other threads allocate is not reported
    return {
        f"{name}, {how}": most_held(whole=how == "whole", **settings)
        for name, settings in models.items()
        for how in ("in parts", "whole")
    }


def most_held(spec: str, training: str, weights: str | None, shard_size: int, whole: bool) -> dict[str, int]:
    """The most that torch held in this process while it built its part of a model, the part, and a whole layer.

    Args:
        whole: build the whole and cut it, in the place of building the part.
    """
    gc.collect()
    log = AllocatorLog()
    log.start()
    if whole:
        kind, settings = ModelSpec.model_validate_json(spec), Training.model_validate_json(training)
        model: Any = build_model(kind, settings, weights=weights)
        shard_blocks(model, mesh=mesh_of(shard_size))
    else:
        model = in_parts(spec, training, weights, shard_size)
    live = peak = 0
    there: dict[int, int] = {}  # by address: a block that another thread took back is known by its next use alone
    for address, nbytes in log.stop():
        live += max(nbytes, 0) - there.pop(address, 0)
        if nbytes > 0:
            there[address] = nbytes
        peak = max(peak, live)
    part = sum(parameter.to_local().nbytes for parameter in model.parameters())
    layer = sum(2 * parameter.numel() for parameter in model.model.layers[0].parameters())
    return {"peak": peak, "part": part, "layer": layer}


def meddling(spec: str, training: str, shard_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model whose root initializes a layer again, built in parts and alone."""
    usual = LlamaPreTrainedModel._init_weights

    def again(model: Any, module: Any) -> None:
        usual(model, module)
        if isinstance(module, LlamaModel):
            torch.nn.init.normal_(module.layers[0].mlp.up_proj.weight)

    LlamaPreTrainedModel._init_weights = again
    try:
        return built(spec, training, None, shard_size), alone(spec, training, None)
    finally:
        LlamaPreTrainedModel._init_weights = usual

"""Block-coordinate training on PyTorch's FSDP2: only public interfaces of ``torch.distributed.fsdp``.

Every layer is a unit that is gathered before its forward and released after it, so that of a frozen layer each process
holds 2/N bytes per entry. Backward stops at the active block: layers below it are not gathered a second time, and
gradients are reduced for the active block alone. A step of block i of L therefore gathers L layers in forward and
L - i in backward, and reduces one, where full-parameter training gathers 2L and reduces L.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer

from badam.blocks.names import belongs
from badam.blocks.partition import layer_paths
from badam.errors import InputError
from badam.optim.block import BlockOptimizer

BaseFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


def shard_blocks(
    model: nn.Module,
    *,
    mesh: DeviceMesh | None = None,
    layers: Sequence[str] | None = None,
    compute_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = torch.float32,
) -> nn.Module:
    """Shard ``model`` in place for block-coordinate training: one unit per layer, one for the input embedding.

    What is left (final norm, head, a tied embedding) belongs to the root and stays gathered from the start of forward
    to the end of backward, because losses reach for the head outside of any module.

    Args:
        model: the same weights on every process; they are cut, not sent.
        mesh: one dimension shards over all its processes; of two, the first replicates and the second shards (HSDP).
            By default one dimension over all processes. Several processes with a second dimension of 1 hold whole
            copies.
        layers: paths of the units; by default the layers that are found in the module tree.
        compute_dtype: gather and compute in this type; None for the parameters' own.
        reduce_dtype: sum gradients in this type; None for the type that they are computed in.

    Returns:
        ``model``.

    Raises:
        InputError: if there is no process group, the mesh has more than two dimensions, or there are no layers.
    """
    trained = shard_units(model, mesh=mesh, layers=layers, compute_dtype=compute_dtype, reduce_dtype=reduce_dtype)
    thaw_for_first_forward(model, trained)
    return model


def shard_units(
    model: nn.Module,
    *,
    mesh: DeviceMesh | None = None,
    layers: Sequence[str] | None = None,
    compute_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = torch.float32,
) -> list[str]:
    """What :func:`shard_blocks` does before :func:`thaw_for_first_forward`, which comes when there are data.

    Returns:
        Names of the parameters that may be trained.
    """
    if not dist.is_initialized():
        raise InputError(
            "Sharding needs the processes to know each other.",
            advice="Call torch.distributed.init_process_group() first, or start with torchrun.",
        )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    mesh = mesh or init_device_mesh(parameters[0].device.type, (dist.get_world_size(),))
    if mesh.ndim > 2:
        raise InputError(f"A mesh of {mesh.ndim} dimensions is not supported.", advice="Use one, or two for HSDP.")
    paths = layer_paths(name for name, _ in model.named_parameters()) if layers is None else layers
    if not paths:
        raise InputError("No repeated layers to shard were found.", advice="Name the units in layers.")
    settings: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype),
    }
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for unit in (_lone_embedding(model), *(model.get_submodule(path) for path in paths)):
        if unit is not None:
            fully_shard(unit, **settings)
    fully_shard(model, **settings, reshard_after_forward=False)
    return trained


def mesh_of(shard_size: int) -> DeviceMesh:
    """The mesh of all processes in which every ``shard_size`` that follow each other hold one copy of the model.

    Launchers number the processes of a machine one after another, so that a group which a machine's number is a
    multiple of lies within one, and gradients alone travel between machines.

    Raises:
        InputError: if the processes cannot be divided into groups of that size.
    """
    count, device = dist.get_world_size(), "cuda" if dist.get_backend() == "nccl" else "cpu"
    if count % shard_size:
        raise InputError(
            f"{count} processes cannot be divided into groups of {shard_size}.",
            advice=f"Choose a size that {count} is a multiple of.",
        )
    if count == shard_size:
        return init_device_mesh(device, (count,))
    return init_device_mesh(device, (count // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))


def sharded_block_optimizer(model: nn.Module, base: BaseFactory, **options: Any) -> BlockOptimizer:
    """A block optimizer on a model that :func:`shard_blocks` has sharded; its gathers follow the active block.

    Args:
        model: the sharded model.
        base: makes the base optimizer from parameters, ``lambda parameters: AdamW(parameters, lr=1e-5)``.
        options: of :class:`badam.BlockOptimizer`.

    Raises:
        InputError: if the model is not sharded, or as :class:`badam.BlockOptimizer` does.
        RanksDisagree: if the processes would not train the same.
    """
    if not isinstance(model, FSDPModule):
        raise InputError("The model is not sharded.", advice="Call shard_blocks(model) first.")
    optimizer = BlockOptimizer(base(model.parameters()), list(model.named_parameters()), **options)
    follow_blocks(model, optimizer)
    return optimizer


def follow_blocks(model: nn.Module, optimizer: BlockOptimizer) -> Callable[[], None]:
    """Gather no layer below the active block in backward; returns what ends this.

    FSDP2 gathers, while one unit is in backward, the one before it. Where backward stops, nobody waits for that one.
    """
    units = [(path, module) for path, module in model.named_modules() if isinstance(module, FSDPModule)]

    def on_switch(changed: BlockOptimizer) -> None:
        lowest = _lowest_unit([path for path, _ in units], [member.name for member in changed.active_parameters], model)
        for path, unit in units:
            unit.set_modules_to_backward_prefetch([unit] if path == lowest else [])

    return optimizer.register_switch_hook(on_switch)


def _lowest_unit(paths: Sequence[str], active: Sequence[str], model: nn.Module) -> str | None:
    """The unit in which backward ends; None if it reaches the start of the model."""
    order = {name: position for position, (name, _) in enumerate(model.named_parameters())}
    lowest = min(active, key=order.__getitem__)
    inside = [path for path in paths if path and belongs(lowest, (path,))]
    if inside:
        return max(inside, key=len)
    layered = [position for name, position in order.items() if belongs(name, [path for path in paths if path])]
    return "" if order[lowest] > max(layered) else None


def _lone_embedding(model: nn.Module) -> nn.Module | None:
    """The input embedding, if no other module shares its weight: the layers' units share nothing with others."""
    find = getattr(model, "get_input_embeddings", None)
    embedding = find() if callable(find) else None
    if not isinstance(embedding, nn.Module):
        return None
    own = {id(parameter) for parameter in embedding.parameters()}
    uses = sum(
        id(parameter) in own
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    return embedding if uses == len(own) else None


def thaw_for_first_forward(model: nn.Module, trained: Sequence[str]) -> None:
    """Let FSDP2 see every trained parameter as such while it prepares itself, in the root's first forward.

    It then notes the types of each unit's trainable parameters. For a unit that is frozen at that time it would note
    none, and later reduce in the type of the gradient, or fail where parameters and gradients differ in type.
    """

    def thaw(module: nn.Module, _: Any) -> None:
        named = dict(module.named_parameters())
        frozen.extend(name for name in trained if not named[name].requires_grad)
        for name in frozen:
            named[name].requires_grad_(True)

    def freeze_again(module: nn.Module, _: Any) -> None:
        named = dict(module.named_parameters())
        for name in frozen:  # of the root these are the gathered parameters, which stand in for the sharded ones
            named[name].requires_grad_(False)
        for name in frozen:
            shards[name].requires_grad_(False)
        for handle in handles:
            handle.remove()
        frozen.clear()
        shards.clear()

    frozen: list[str] = []
    shards = dict(model.named_parameters())
    handles = [
        model.register_forward_pre_hook(thaw, prepend=True),
        model.register_forward_pre_hook(freeze_again),
    ]

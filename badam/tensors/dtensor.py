"""Tensors of which every process holds a part: their local part, and sums over all parts.

A sharded parameter (FSDP2's ``fully_shard``) is a ``DTensor``. Whoever only reads or writes entries works on its local
part; whoever needs a number of the whole tensor adds up over the processes that hold the parts. Nothing here loads
``torch.distributed.tensor`` for those who train in one process.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_SHARD_NUMBER_FACTOR = 0x9E3779B97F4A7C15


def is_sharded(tensor: Any) -> TypeGuard[DTensor]:
    """Whether ``tensor`` is a DTensor, so that this process may hold only a part of it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` in this process, outside autograd; shares its memory and its version."""
    if not is_sharded(tensor):
        return tensor.detach()
    with torch.no_grad():  # detach() of a DTensor would count versions of its own
        local: Tensor = tensor.to_local()
        return local


def version_of(tensor: Tensor) -> int:
    """How often the local part of ``tensor`` was written."""
    return (local_part(tensor) if is_sharded(tensor) else tensor)._version


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape of the whole tensor; DeepSpeed's ZeRO-3 leaves an empty one in the place of what it partitions."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def is_held_by_deepspeed(tensor: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 has partitioned ``tensor``."""
    return hasattr(tensor, "ds_id")


def shard_number(tensor: Tensor) -> int:
    """Which part of ``tensor`` this process holds, counted over the dimensions it is cut along; replicas agree."""
    if not is_sharded(tensor):
        return 0
    number = 0
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_shard():
            number = number * tensor.device_mesh.size(dimension) + tensor.device_mesh.get_local_rank(dimension)
    return number


def seed_of_shard(seed: int, number: int) -> int:
    """A seed for shard ``number``, so that no two shards draw the same numbers and replicas of a shard do."""
    return (seed + number * _SHARD_NUMBER_FACTOR) % 2**63


def norm_over_shards(parts: Sequence[Tensor], tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """The norm of all of ``tensors`` as one vector; every process gets the same. Collective where one is sharded.

    Args:
        parts: the norm of the local part of each tensor, shape () each.
        tensors: the tensors, plain or sharded.
        norm_type: of the p-norm.

    Returns:
        Shape (), of the type and on the device of the first of ``parts``.
    """
    layouts: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for part, tensor in zip(parts, tensors, strict=True):
        layouts.setdefault(_shard_groups(tensor), []).append(part.to(parts[0].device))
    norms = [_over(groups, torch.stack(of_layout), norm_type) for groups, of_layout in layouts.items()]
    total: Tensor = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), norm_type)
    return total


def _over(groups: Sequence[dist.ProcessGroup], parts: Tensor, norm_type: float) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(parts, norm_type)
    if not groups:
        return norm
    largest = norm_type == float("inf")
    summed = norm if largest else norm**norm_type
    for group in groups:
        dist.all_reduce(summed, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=group)
    return summed if largest else summed ** (1 / norm_type)


def _shard_groups(tensor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    if not is_sharded(tensor):
        return ()
    mesh = tensor.device_mesh
    return tuple(mesh.get_group(index) for index, placement in enumerate(tensor.placements) if placement.is_shard())

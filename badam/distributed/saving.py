"""Checkpoints of several processes, with ``torch.distributed.checkpoint``: saved on N, resumed on M.

Each process writes its own shards of weights, masters and moments. A checkpoint is a directory that gets its name only
when all of it is on disk: what has the name is whole, whatever happened to a process meanwhile.
"""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from badam.errors import InputError, StateError, in_one_line
from badam.optim.block import BlockOptimizer
from badam.tensors.dtensor import is_sharded

_PARTIAL = ".partial"
_TENSOR = "a tensor of the checkpoint"
"""Stands, in the part of the optimizer's state that is saved as it is, where a tensor was taken out."""


def save_checkpoint(path: str | os.PathLike[str], model: nn.Module, optimizer: BlockOptimizer) -> Path:
    """Write weights and optimizer state to the new directory ``path``. Collective.

    Returns:
        ``path``.

    Raises:
        InputError: if there is something at ``path`` already.
        OSError: in all processes, if one of them could not write its part.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}{_PARTIAL}")
    if _on_first_rank(target.exists()):
        raise InputError(f"There is something at {target} already.", advice="Give each checkpoint a name of its own.")
    if _rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)  # what a process that was killed had left
    _wait_for_all()
    tensors: dict[str, Any] = {}
    rest = _without_tensors(optimizer.state_dict(), "", tensors)
    layouts = {key: (_is_like_a_parameter(value), tuple(value.shape), value.dtype) for key, value in tensors.items()}
    packed = _packed({"rest": rest, "layouts": layouts})
    _save({"model": get_model_state_dict(model), "optimizer": tensors, "badam": packed}, partial)
    if _rank() == 0:
        partial.rename(target)
    _wait_for_all()
    return target


def load_checkpoint(path: str | os.PathLike[str], model: nn.Module, optimizer: BlockOptimizer) -> None:
    """Continue where :func:`save_checkpoint` was called, on as many processes as there are now. Collective.

    Stochastic rounding draws other numbers where a parameter is cut into another number of shards; all else is the
    same.

    Raises:
        InputError: if there is no complete checkpoint at ``path``.
        StateError: if it belongs to another model or partition; nothing is changed then.
    """
    target = Path(path)
    if not (target / ".metadata").is_file():
        raise InputError(
            f"There is no complete checkpoint at {target}.",
            advice="Directories whose name begins with a dot were not finished; use an older checkpoint.",
        )
    plain: dict[str, Any] = {"badam": b""}
    _load(plain, target)
    saved = torch.load(io.BytesIO(plain["badam"]), weights_only=True)
    rest, layouts = saved["rest"], saved["layouts"]
    optimizer.check_state(rest)
    parameters = dict(optimizer.named_parameters_list)
    positions = _names_by_position(optimizer)
    tensors = {
        key: _room_for(parameters[_parameter_of(key, positions)] if like else None, shape, dtype)
        for key, (like, shape, dtype) in layouts.items()
    }
    weights = get_model_state_dict(model)
    _load({"model": weights, "optimizer": tensors}, target)
    set_model_state_dict(model, weights)
    optimizer.load_state_dict(cast("dict[str, Any]", _with_tensors(rest, "", tensors)))


def load_weights(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Read the weights alone of what :func:`save_checkpoint` wrote. Collective.

    Raises:
        StateError: if they belong to another model.
    """
    weights = get_model_state_dict(model)
    _load({"model": weights}, Path(path))
    set_model_state_dict(model, weights)


def save_whole_model(path: str | os.PathLike[str], model: nn.Module) -> Path:
    """Write the whole model for ``from_pretrained``: safetensors and configuration. Collective.

    Rank 0 holds one copy of all weights in host memory meanwhile. The directory gets its name when it is whole.

    Returns:
        ``path``.

    Raises:
        InputError: if the model is not transformers', or there is something at ``path`` already.
    """
    target = Path(path)
    if not hasattr(model, "save_pretrained"):
        raise InputError(
            f"{type(model).__name__} has no save_pretrained.",
            advice="Save get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) in your own form.",
        )
    if _on_first_rank(target.exists()):
        raise InputError(f"There is something at {target} already.", advice="Give the model a directory of its own.")
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if _rank() == 0:
        partial = target.with_name(f".{target.name}{_PARTIAL}")
        shutil.rmtree(partial, ignore_errors=True)
        cast(Any, model).save_pretrained(partial, state_dict=weights, safe_serialization=True)
        partial.rename(target)
    _wait_for_all()
    return target


def _packed(value: Any) -> bytes:
    """``value`` as one thing: torch.distributed.checkpoint would take a dictionary apart, and need it to load it."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _save(state: dict[str, Any], partial: Path) -> None:
    try:
        save(state, checkpoint_id=partial)
    except CheckpointException as error:  # no Exception to Python, so nobody would turn it into a sentence
        if _rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        raise OSError(f"process {rank} could not write its part: {in_one_line(cause)}") from error


def _load(state: dict[str, Any], target: Path) -> None:
    try:
        load(state, checkpoint_id=target)
    except (RuntimeError, CheckpointException) as error:
        raise StateError(
            f"The checkpoint at {target} does not fit this model: {in_one_line(error)}",
            advice="Load it into the model it was saved with.",
        ) from error


def _without_tensors(value: Any, path: str, found: dict[str, Tensor]) -> Any:
    """``value`` with its tensors moved to ``found``, under the keys that lead to them."""
    if isinstance(value, Tensor):
        found[path] = value.detach()
        return _TENSOR
    if isinstance(value, dict):
        return {key: _without_tensors(inner, f"{path}/{key}", found) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_without_tensors(inner, f"{path}/{index}", found) for index, inner in enumerate(value))
    return value


def _with_tensors(value: Any, path: str, found: dict[str, Any]) -> Any:
    """The inverse of :func:`_without_tensors`."""
    if isinstance(value, str) and value == _TENSOR:
        return found[path]
    if isinstance(value, dict):
        return {key: _with_tensors(inner, f"{path}/{key}", found) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_with_tensors(inner, f"{path}/{index}", found) for index, inner in enumerate(value))
    return value


def _is_like_a_parameter(value: Tensor) -> bool:
    return is_sharded(value) or value.dim() > 0


def _names_by_position(optimizer: BlockOptimizer) -> list[str]:
    names = {id(parameter): name for name, parameter in optimizer.named_parameters_list}
    return [names.get(id(parameter), "") for group in optimizer.param_groups for parameter in group["params"]]


def _parameter_of(key: str, positions: list[str]) -> str:
    """The parameter that a tensor belongs to: ``/state/<position>/<entry>`` or ``/badam/masters/<name>``."""
    _, kind, rest = key.split("/", 2)
    return positions[int(rest.split("/")[0])] if kind == "state" else rest.split("/", 1)[1]


def _room_for(parameter: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for a saved tensor, cut like ``parameter`` where it is of its shape."""
    if parameter is None:
        return torch.zeros(shape, dtype=dtype)
    if is_sharded(parameter) and tuple(parameter.shape) == shape:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return torch.zeros(shape, dtype=dtype, device=parameter.device)


def _on_first_rank(flag: bool) -> bool:
    """What rank 0 sees: the others may look later, or at another disk."""
    seen = [flag]
    if dist.is_initialized():
        dist.broadcast_object_list(seen, src=0)
    return seen[0]


def _wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0

"""Answers for operators on fake tensors, from what the same operator answered for equal arguments before.

A rehearsal runs the same few hundred operators again and again: in every layer, for every block, at every candidate.
torch's fake tensors have a cache for that which serves any tensor and any symbolic shape, and takes longer over its
key than the operators of a small kernel take to run. What is rehearsed has plain shapes, so a plainer key does; where
anything is out of the ordinary, torch is asked.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

Key = tuple[Hashable, ...]

_PLAIN = frozenset(
    [bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size]
)


@dataclass(frozen=True, slots=True)
class _New:
    """A tensor over storage of its own."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class _View:
    """Another look at the storage of positional argument ``of``."""

    of: int
    new: _New
    offset: int


@dataclass(frozen=True, slots=True)
class _Same:
    """Positional argument ``of`` itself, as in-place operators return it."""

    of: int


_Answer = _New | _View | _Same | None


@dataclass(frozen=True, slots=True)
class _Known:
    """An operator's outputs (``several`` if it returns a tuple) and the bytes that it moves."""

    outputs: tuple[_Answer, ...]
    several: bool
    moved_bytes: int


class _Extraordinary(Exception):
    """Something that only torch knows how to answer."""


_KNOWN: dict[Key, _Known] = {}
"""By operator and arguments; shared by all rehearsals of the process. Only shapes are in it, no tensors."""


def answer(mode: FakeTensorMode | None, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, int]:
    """What ``func(*args, **kwargs)`` returns under ``mode``, and the bytes it moves.

    Call it where operators are dispatched to. Without a mode nothing is remembered.
    """
    key: Key | None = None
    if mode is not None:
        with suppress(_Extraordinary):
            given = _key(args)
            key = (func, given, _key(tuple(kwargs.items())) if kwargs else ())
    if mode is None or key is None:
        output = func(*args, **kwargs)
        return output, moved_bytes(func, args, kwargs, output)
    if key in _KNOWN:
        known = _KNOWN[key]
        made = tuple(_made(mode, one, args) for one in known.outputs)
        return made if known.several else made[0], known.moved_bytes
    output = func(*args, **kwargs)
    moved = moved_bytes(func, args, kwargs, output)
    with suppress(_Extraordinary):
        _KNOWN[key] = _learned(func, args, output, moved, before=given)
    return output, moved


def moved_bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int:
    """Bytes that an operator reads and writes: its tensors, those written in place twice. Views move nothing.

    Not counted: what stays in caches between reading and writing, and what a kernel reads more than once.
    """
    if getattr(func, "is_view", False):
        return 0
    read = sum(_nbytes(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    written = 0
    for position, argument in enumerate(getattr(getattr(func, "_schema", None), "arguments", ())):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written += sum(_nbytes(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    if not written:
        written = sum(_nbytes(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    return read + written


def _nbytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes: an expanded one has fewer than entries."""
    return min(tensor.numel() * tensor.dtype.itemsize, tensor.untyped_storage().nbytes())


def _key(values: Any) -> Key:
    parts: list[Hashable] = []
    for value in values:
        kind = type(value)
        if kind is FakeTensor or isinstance(value, FakeTensor):
            if value.constant is not None:
                raise _Extraordinary
            parts.append((value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device))
        elif kind in _PLAIN:
            parts.append((kind, value))  # 1, 1.0 and True are equal, and no equal arguments
        elif kind in (list, tuple):
            parts.append((kind, _key(value)))
        else:
            raise _Extraordinary
    return tuple(parts)


def _learned(func: Any, args: tuple[Any, ...], output: Any, moved: int, *, before: Key) -> _Known:
    """How to make ``output`` again. ``before``: the arguments' key before the operator ran."""
    if not isinstance(func, OpOverload) or _key(args) != before:  # an operator may have resized its argument
        raise _Extraordinary
    several = type(output) is tuple
    outputs = output if several else (output,)
    return _Known(tuple(_described(func, args, one) for one in outputs), several, moved)


def _described(func: OpOverload, args: tuple[Any, ...], output: Any) -> _Answer:
    if output is None:
        return None
    if not isinstance(output, FakeTensor) or output.constant is not None or output.requires_grad:
        raise _Extraordinary
    if output.layout is not torch.strided or output.is_conj() or output.is_neg():
        raise _Extraordinary
    new = _New(tuple(output.shape), output.stride(), output.dtype, output.fake_device)
    storage = output.untyped_storage()
    for position, arg in enumerate(args):
        if arg is output:
            return _Same(position)
        if isinstance(arg, FakeTensor) and arg.untyped_storage()._cdata == storage._cdata:
            if not func.is_view:
                raise _Extraordinary
            return _View(position, new, int(output.storage_offset()))
    if func.is_view or output.storage_offset() or storage.nbytes() != _needed_bytes(new):
        raise _Extraordinary
    return new


def _needed_bytes(new: _New) -> int:
    """Bytes of the smallest storage that holds a tensor of this size and stride."""
    if 0 in new.size:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(new.size, new.stride, strict=True))
    return int((last + 1) * new.dtype.itemsize)


def _made(mode: FakeTensorMode, known: _Answer, args: tuple[Any, ...]) -> Tensor | None:
    if known is None:
        return None
    if isinstance(known, _Same):
        return args[known.of]  # type: ignore[no-any-return]
    new = known.new if isinstance(known, _View) else known
    guard = torch._C._DisableTorchDispatch()
    try:
        empty = torch.empty_strided(new.size, new.stride, dtype=new.dtype, device="meta")
        if isinstance(known, _View):
            empty.set_(args[known.of].untyped_storage(), known.offset, new.size, new.stride)
    finally:
        del guard
    return FakeTensor(mode, empty, new.device)

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

from badam_planner.rehearsal.grouped_product import GROUPED_PRODUCT, grouped_product, needs_a_rule

Key = tuple[Hashable, ...]

_PLAIN = frozenset(
    [bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size]
)

_UNMARKED_VIEWS = frozenset([torch.ops.aten._unsafe_view.default])
"""Operators that look at their first argument's storage and are not declared as views; ``x @ w`` ends in one."""


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


class Maker:
    """Makes fake tensors, as torch's own constructor does in a third of its time.

    All that tells two fresh fake tensors apart is their meta tensor and device: torch makes the first one for each
    device, the others get copies of its attributes.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._attributes: dict[torch.device, dict[str, Any]] = {}

    def made(self, known: _Answer, args: tuple[Any, ...]) -> Tensor | None:
        """The output ``known`` of an operator that was called with ``args``."""
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
        return self._wrapped(empty, new.device)

    def _wrapped(self, empty: Tensor, device: torch.device) -> FakeTensor:
        attributes = self._attributes.get(device)
        if attributes is None:
            first = FakeTensor(self._mode, empty, device)
            self._attributes[device] = dict(first.__dict__)
            return first
        tensor: FakeTensor = Tensor._make_subclass(
            FakeTensor, empty, False, dispatch_device=True, device_for_backend_keys=device
        )
        torch._C._set_throw_on_mutable_data_ptr(tensor)
        tensor.__dict__.update(attributes)
        return tensor


def answer(maker: Maker | None, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, int]:
    """What ``func(*args, **kwargs)`` returns, and the bytes it moves.

    Call it where operators are dispatched to. Without a maker nothing is remembered.
    """
    key: Key | None = None
    if maker is not None:
        with suppress(_Extraordinary):
            given = _key(args)
            key = (func, given, _key(tuple(kwargs.items())) if kwargs else ())
            if "out" in kwargs:
                key = None  # that very tensor comes back
    if maker is None or key is None:
        output = _asked(func, args, kwargs)
        return output, moved_bytes(func, args, kwargs, output)
    known = _KNOWN.get(key)
    if known is not None:
        if not known.several:
            return maker.made(known.outputs[0], args), known.moved_bytes
        return tuple(maker.made(one, args) for one in known.outputs), known.moved_bytes
    output = _asked(func, args, kwargs)
    moved = moved_bytes(func, args, kwargs, output)
    with suppress(_Extraordinary):
        _KNOWN[key] = _learned(func, args, output, moved, before=given)
    return output, moved


def _asked(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What torch answers, or what it would if it had a rule for these types."""
    if func is GROUPED_PRODUCT and isinstance(args[0], FakeTensor) and needs_a_rule(args[0]):
        return grouped_product(*args, **kwargs)
    return func(*args, **kwargs)


def moved_bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int:
    """Bytes that an operator reads and writes: its tensors, those written in place twice. Views move nothing.

    Not counted: what stays in caches between reading and writing, and what a kernel reads more than once.
    """
    if _is_view(func):
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


def _is_view(func: Any) -> bool:
    return getattr(func, "is_view", False) or func in _UNMARKED_VIEWS


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
        elif kind is torch.Generator:
            parts.append((kind,))  # what is drawn has no shape
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
            if not _is_view(func):
                raise _Extraordinary
            return _View(position, new, int(output.storage_offset()))
    if _is_view(func) or output.storage_offset() or storage.nbytes() != _needed_bytes(new):
        raise _Extraordinary
    return new


def _needed_bytes(new: _New) -> int:
    """Bytes of the smallest storage that holds a tensor of this size and stride."""
    if 0 in new.size:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(new.size, new.stride, strict=True))
    return int((last + 1) * new.dtype.itemsize)

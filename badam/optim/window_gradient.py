"""A gradient that looks as large as its parameter and holds one window of it.

The host's loop works with ``parameter.grad``: it accumulates over micro-batches, clips, reads norms, sets to None.
All that keeps its meaning if what stands there is a tensor of the parameter's shape whose entries outside the window
are zero. This one stores only the window, in fp32, so that the full gradient is released as soon as it was made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from badam.errors import InputError

aten = torch.ops.aten

_SAME_ON_THE_WINDOW = {
    aten.mul_.Scalar,
    aten.mul_.Tensor,
    aten.div_.Scalar,
    aten.div_.Tensor,
    aten.neg_.default,
    aten.zero_.default,
    aten.clamp_.default,
    aten.nan_to_num_.default,
    aten._foreach_mul_.Scalar,
    aten._foreach_mul_.Tensor,
    aten._foreach_norm.Scalar,
    aten._amp_foreach_non_finite_check_and_unscale_.default,
}
"""Operators that treat all entries alike and leave zero zero, if their other operands are single numbers."""


class WindowLike(Protocol):
    """What a gradient needs to know of its window."""

    parameter: torch.nn.Parameter

    def add_to(self, values: Tensor, tensor: Tensor) -> None:
        """Add the window's entries of ``tensor`` to ``values``."""

    def spread(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """``values`` in the window, zeros elsewhere."""


class WindowGradient(Tensor):
    """The gradient of a parameter of which only ``window`` is trained; ``window_values`` are its entries there (fp32).

    Scaling, clipping, norms over all entries and autograd's own accumulation happen on the window in fp32. Every
    other operator that returns something sees the dense tensor; one that would write elsewhere is refused.
    """

    window: WindowLike
    window_values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, window: WindowLike, values: Tensor) -> WindowGradient:
        like = window.parameter
        gradient: WindowGradient = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device, storage_size=0
        )
        return gradient

    def __init__(self, window: WindowLike, values: Tensor) -> None:
        self.window = window
        self.window_values = values

    def __repr__(self) -> str:  # type: ignore[override]
        return f"WindowGradient({self.window_values.numel()} of {self.numel()} entries of shape {tuple(self.shape)})"

    def dense(self) -> Tensor:
        """The full gradient in the parameter's type, zero outside the window."""
        return self.window.spread(self.window_values, self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        gradient = args[0]
        if func is aten.add_.Tensor and isinstance(gradient, cls) and not isinstance(args[1], cls) and not kwargs:
            gradient.window.add_to(gradient.window_values, args[1])  # how autograd accumulates
            return gradient
        if func is aten.detach.default:
            return cls(gradient.window, gradient.window_values)
        if func is aten.clone.default:
            return cls(gradient.window, gradient.window_values.clone())
        norm_of_all = func is aten.linalg_vector_norm.default and _is_norm_of_all(*args[1:], **kwargs)
        if norm_of_all or (func in _SAME_ON_THE_WINDOW and _only_numbers_beside(args[1:], cls)):
            result = func(*_mapped(args, cls, lambda leaf: leaf.window_values), **kwargs)
            return gradient if result is not None and func._schema.is_mutable else result
        if func._schema.is_mutable:
            raise InputError(
                f"{func} cannot write into the gradient of a parameter of which only a window is trained.",
                advice="Change the masters' gradients instead: those of the parameters in optimizer.param_groups.",
            )
        dense = _mapped((args, kwargs), cls, WindowGradient.dense)
        return func(*dense[0], **dense[1])


def _mapped(tree: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    return tree_map(lambda leaf: change(leaf) if isinstance(leaf, kind) else leaf, tree)


def _is_norm_of_all(order: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> bool:
    """Whether this is a norm over all entries to which zeros contribute nothing."""
    return order > 0 and not dim and not keepdim


def _only_numbers_beside(others: Sequence[Any], kind: type) -> bool:
    return all(other.numel() == 1 for other in others if isinstance(other, Tensor) and not isinstance(other, kind))

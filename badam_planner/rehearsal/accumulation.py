"""Autograd's sums of gradients, which it makes in place where nobody else holds the first summand.

Where a tensor was used several times, the engine adds up what comes back. On ordinary tensors it writes the sum over
the first summand if that is held by nothing else; on tensor subclasses, such as fake tensors, it never does. Left
alone, a rehearsal would count one tensor too many at each such sum.

Source: ``InputBuffer::add`` and ``can_accumulate_inplace`` in PyTorch's ``torch/csrc/autograd/input_buffer.cpp``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

ADD = torch.ops.aten.add.Tensor
SCATTER_ADD = torch.ops.aten.scatter_add.default


def accumulates_in_place(func: Any, args: tuple[Any, ...], unshared: tuple[int, int]) -> bool:
    """Whether ``func(*args)`` is a sum by the autograd engine that real tensors would make in place.

    Args:
        func, args: what a dispatch mode is called with during backward.
        unshared: what :func:`holders_of_a_sum` says.
    """
    return (
        func is ADD
        and not torch.is_grad_enabled()
        and isinstance(args[1], Tensor)
        and args[0].shape == args[1].shape
        and args[0].dtype == args[1].dtype
        and torch._C._current_autograd_node() is not None
        and _holders(args[0]) == unshared
    )


def scatters_in_place(func: Any) -> bool:
    """Whether ``func``, called during backward, is the sum of a gather's gradients, which real tensors make in place.

    Source: what the allocator reports of torch 2.13, whose own dispatch for tensor subclasses makes a new tensor.
    """
    return func is SCATTER_ADD and type(torch._C._current_autograd_node()).__name__ == "GatherBackward0"


def _holders(tensor: Tensor) -> tuple[int, int]:
    """How many references there are to a tensor and to its storage, those of this call included."""
    uses: int = getattr(tensor, "_use_count")()  # noqa: B009 - unknown to torch's type stubs
    return uses, torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


@cache
def holders_of_a_sum() -> tuple[int, int]:
    """The references to a first summand that nobody else holds, found out with the smallest sum there is.

    To be called outside of dispatch modes' handlers, inside of which there is no autograd.
    """
    found: list[tuple[int, int]] = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func is ADD:
                found.append(_holders(args[0]))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), torch.enable_grad():
        shared = torch.empty(1, requires_grad=True) * 1
        branches = [shared * 2, shared * 3]
        with Look():
            torch.autograd.backward(branches, [torch.empty(1), torch.empty(1)])
    return found[0]

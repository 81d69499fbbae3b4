"""Operations of matrix products by operator, with the same formulas under every version of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Two products per head: scores, and their sum over the values. Grouped heads of keys count for every query head.

    torch's own formula has known grouped heads since 2.12 only, and raised before.
    """
    batch, heads, queries, width = query.shape
    return 2 * batch * heads * queries * key.shape[2] * (width + value.shape[3])


def _attention_backward(_gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Five products per head: the scores once more, and gradients of values, scores, queries and keys."""
    batch, heads, queries, width = query.shape
    return 2 * batch * heads * queries * key.shape[2] * (3 * width + 2 * value.shape[3])


def four_bit_product(inputs: Tensor, _packed: Tensor, shape: Sequence[int], *_: Any, **__: Any) -> int:
    """A product with a weight of ``shape`` that is packed into 4 bits an entry."""
    return 2 * inputs.numel() * shape[0]


def _known() -> dict[Any, Callable[..., int]]:
    known = dict(flop_registry)
    for kernel in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu"):
        known[getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}")] = _attention
        known[getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_backward")] = _attention_backward
    return known


FLOPS: dict[Any, Callable[..., int]] = _known()
"""By operator, called with its arguments and ``out_val``: 2 m n k each product, as torch counts.

A causal mask halves the work of a good kernel; it is counted in full, as torch does.
"""

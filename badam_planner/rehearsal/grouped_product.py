"""The product of the tokens of each expert with that expert's weights, in the types that torch cannot fake.

torch's own rule for fake tensors knows bfloat16 only. The kernels take float32 and float16 as well: they multiply group
by group into the output and return nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUPED_PRODUCT = torch.ops.aten._grouped_mm.default

_OTHER_TYPES = (torch.float32, torch.float16)
_ALIGNMENT_BYTES = 16


def needs_a_rule(first: Tensor) -> bool:
    """Whether torch would refuse to fake the product for its first factor's type."""
    return first.dtype in _OTHER_TYPES


def grouped_product(
    first: Tensor,
    second: Tensor,
    offsets: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """An output like that of ``aten._grouped_mm``.

    Formula: with one factor in two dimensions, its rows or columns of group i are multiplied by matrix i of the other:
    [tokens, k] x [groups, k, n] -> [tokens, n]; with both, each group's share of the inner dimension gives a matrix:
    [m, tokens] x [tokens, n] -> [groups, m, n]. Source: the results of torch 2.13's CPU kernel, with which a test
    compares; it takes no memory besides.

    Args:
        first, second: factors, of two or three dimensions.
        offsets: where each group ends, int32 [groups]; None if both factors have three dimensions.
        bias, out_dtype: as the operator has them; neither is supported by its kernels.

    Raises:
        RuntimeError: in the kernels' words, for strides that they refuse.
    """
    for factor in (first, second):
        if any(step * factor.element_size() % _ALIGNMENT_BYTES for step in factor.stride() if step != 1):
            raise RuntimeError("strides should be multiple of 16 bytes")
    if first.dim() == second.dim() == 2:
        assert offsets is not None  # the operator's own condition
        size: tuple[int, ...] = (offsets.shape[0], first.shape[0], second.shape[1])
    elif first.dim() == second.dim():
        size = (first.shape[0], first.shape[1], second.shape[2])
    else:
        size = (first.shape[-2], second.shape[-1])
    return first.new_empty(size)

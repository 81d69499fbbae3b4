"""Scratch memory of kernels: taken while a kernel runs, and never visible as a tensor. Pure.

Only what is large is listed: scratch that grows with batch and length, or is as large as a weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

FLASH_BACKWARD = "aten._scaled_dot_product_flash_attention_for_cpu_backward.default"
"""The fake CPU operator that stands for the card's flash attention in backward."""

FOUR_BIT_PRODUCT = "bitsandbytes.gemm_4bit.default"
"""The product with a weight in 4 bits."""

BY_INDEX = frozenset(
    f"aten.{name}"
    for name in ("gather.default", "scatter_add.default", "scatter_add_.default", "scatter.src", "scatter.value")
)
"""Operators that a CPU computes in fp32 for 16-bit tensors; DeBERTa uses them for relative positions."""

_SEQUENCE_ROUNDING = 128
_FP32 = 4
_HALF = 2


def flash_backward_bytes(query: Sequence[int], key: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Scratch of flash attention's backward, allocation by allocation.

    Formula: fp32 accumulator of the query's gradient and fp32 row sums, lengths rounded up to 128 and head sizes to 32
    (above 128: 64); where several query heads share a key head, the gradients of key and value for every query head.
    Units: bytes. Source: ``mha_bwd`` in PyTorch's ``flash_attn/flash_api.cpp``.
    Not counted: the deterministic variant, which keeps several accumulators.

    Args:
        query: shape [batch, heads, length, head size].
        key: shape [batch, key heads, length, head size].
        itemsize: bytes per entry of query and key.
    """
    batch, heads, length, size = query
    rounded = _round_up(length, _SEQUENCE_ROUNDING)
    accumulator = batch * heads * rounded * _round_up(size, 32 if size <= 128 else 64) * _FP32
    row_sums = batch * heads * rounded * _FP32
    if key[1] == heads:
        return row_sums, accumulator
    expanded = batch * heads * key[2] * size * itemsize
    return row_sums, accumulator, expanded, expanded


def unpacked_bytes(shape: Sequence[int], blocksize: int, itemsize: int) -> tuple[int, ...]:
    """Scratch of a product with a weight in 4 bits, allocation by allocation.

    Formula: the weight in the type of the product, and the fp32 scale of each block. Units: bytes. Source:
    ``_gemm_4bit_default_impl`` of bitsandbytes 0.50, which is what a CPU runs, and a card, too, unless the batch has so
    few tokens that a kernel unpacks on the way: then nothing of this is taken, and the figure is an upper bound.

    Args:
        shape: of the weight, [outputs, inputs].
        blocksize: entries that share a scale.
        itemsize: bytes per entry of the product's type.
    """
    entries = shape[0] * shape[1]
    return entries * itemsize, -(-entries // blocksize) * _FP32


def by_index_bytes(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Scratch that a CPU takes for an operator among ``BY_INDEX``: one fp32 copy of what is gathered or scattered to.

    Formula: 4 bytes for each entry of the output, if it has entries of two bytes and more than one dimension.
    Units: bytes. Source: the allocator's events of torch 2.13, which a test compares. Not counted: copies that the
    kernel makes of arguments which are not contiguous.

    Args:
        shape: of the output.
        itemsize: bytes per entry of the output.
    """
    return (math.prod(shape) * _FP32,) if itemsize == _HALF and len(shape) > 1 else ()


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

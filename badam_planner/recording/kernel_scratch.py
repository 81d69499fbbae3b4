"""Scratch memory of kernels: taken while a kernel runs, and never visible as a tensor. Pure.

Only what is large is listed: scratch that grows with batch and length, or is as large as a weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from badam.plan import Target

FLASH_BACKWARD = "aten._scaled_dot_product_flash_attention_for_cpu_backward.default"
"""The fake CPU operator that stands for the card's flash attention in backward."""

FOUR_BIT_PRODUCT = "bitsandbytes.gemm_4bit.default"
"""The product with a weight in 4 bits."""

BY_INDEX = frozenset(
    f"aten.{name}"
    for name in ("gather.default", "scatter_add.default", "scatter_add_.default", "scatter.src", "scatter.value")
)
"""Operators that a CPU computes in fp32 for 16-bit tensors; DeBERTa uses them for relative positions."""

COLUMN_SUM = "aten.sum.dim_IntList"
"""The sum that makes the gradients of biases and of norms' weights: over all tokens, entry by entry."""

EMBEDDING_BACKWARD = "aten.embedding_dense_backward.default"

PRODUCTS = frozenset(
    f"aten.{name}.{overload}"
    for name in ("mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot", "_addmm_activation", "addbmm")
    for overload in ("default", "out", "dtype")
)
"""Operators that a GPU computes with cuBLAS."""

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


@dataclass(frozen=True, slots=True)
class Occupancy:
    """How many threads a GPU keeps resident, which kernels cut their work by."""

    multiprocessors: int
    threads_per_multiprocessor: int

    @classmethod
    def of(cls, target: Target) -> Occupancy:
        """That of a plan's GPU; of one that is not known, that of the largest that is, so that no scratch is missed."""
        if target.multiprocessors is None or target.threads_per_multiprocessor is None:
            return cls(*MOST_RESIDENT)
        return cls(target.multiprocessors, target.threads_per_multiprocessor)


MOST_RESIDENT = (148, 2048)
"""Multiprocessors, and threads on each, of the B200."""


@dataclass(frozen=True, slots=True)
class ColumnSum:
    """Scratch of a sum over the rows of a contiguous [rows, columns] tensor, in which thread blocks meet.

    Formula: 4 bytes (the sum is made in fp32) for each column, thread block along the rows and place of a vector;
    one thread block along the rows needs none. Units: bytes. Source: ``setReduceConfig`` and ``global_memory_size`` in
    PyTorch's ``ATen/native/cuda/Reduce.cuh``. Not counted: sums of more than 2 GiB, which are made in parts, and some
    bytes of semaphores.
    """

    columns: int
    occupancy: Occupancy

    def nbytes(self, rows: int) -> int:
        """Bytes for ``rows`` rows."""
        if rows < 1 or self.columns < 1:
            return 0
        vector = next(width for width in (4, 2, 1) if self.columns % width == 0)
        most = 512 // vector
        across, down = min(_power_of_two(self.columns // vector), most), min(_power_of_two(rows), most)
        width = min(across, 32)
        height = min(down, most // width)
        width = min(across, most // height)
        if rows < min(height * 16, 256):
            return 0
        rows_per_thread = -(-rows // height)
        blocks_across = -(-(self.columns // vector) // width)
        wanted = self.occupancy.multiprocessors * (self.occupancy.threads_per_multiprocessor // (width * height))
        if rows_per_thread < 256 or blocks_across > wanted:
            return 0
        blocks = min(max(-(-wanted // blocks_across), -(-rows_per_thread // 256)), -(-rows_per_thread // 16))
        return 4 * self.columns * blocks * width * vector if blocks > 1 else 0


@dataclass(frozen=True, slots=True)
class EmbeddingSums:
    """Scratch of an embedding's backward: partial sums of the rows that tokens share.

    Formula: from 3073 tokens on (tokens // 10 + min(tokens, vocabulary)) x width x 4 B. Units: bytes. Source:
    ``embedding_backward_cuda_kernel`` in PyTorch's ``ATen/native/cuda/EmbeddingBackwardKernel.cu``.
    Not counted: indices and what sorts them, some 60 bytes a token.
    """

    vocabulary: int
    width: int

    def nbytes(self, rows: int) -> int:
        """Bytes for ``rows`` tokens."""
        return (rows // 10 + min(rows, self.vocabulary)) * self.width * _FP32 if rows > FEW_TOKENS else 0


FEW_TOKENS = 3072
"""Up to so many, an embedding's backward needs no scratch."""


def column_sum_shape(shape: Sequence[int], dims: Sequence[int]) -> tuple[int, int] | None:
    """The (rows, columns) of a sum over ``dims`` of a contiguous tensor; None if these are not its leading ones."""
    summed = {dim % len(shape) for dim in dims} if shape else set()
    own = [place for place, size in enumerate(shape) if size > 1]
    leading = [place for place in own if place in summed]
    if not leading or own[: len(leading)] != leading or len(leading) == len(own):
        return None
    columns = math.prod(shape[place] for place in own[len(leading) :])
    return math.prod(shape[place] for place in leading), columns


def _power_of_two(number: int) -> int:
    """The largest power of two that is no more than ``number``."""
    return 1 << (max(number, 1).bit_length() - 1)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

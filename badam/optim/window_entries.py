"""Which entries a window trains, and how they are updated: free functions of numbers and tensors.

A *window* is a fixed share of a parameter's flattened entries. Visit after visit it moves on by its own size and goes
round at the end, so over any number of visits no entry is trained more than once more often than another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 2**20
"""Entries that are gathered or scattered at a time: their temporaries are a few MiB whatever the parameter's size."""

_MASK = 2**31 - 1
_GOLDEN = (math.sqrt(5) - 1) / 2


def window_size(numel: int, ratio: float) -> int:
    """Entries in the window of a parameter with ``numel`` entries: the nearest number to the ratio, at least one."""
    return min(numel, max(1, round(numel * ratio)))


def window_ranges(numel: int, size: int, visit: int) -> list[tuple[int, int]]:
    """Positions ``[begin, end)`` that visit number ``visit`` (from 0) trains: one range, or two where it goes round."""
    begin = visit * size % numel
    end = begin + size
    return [(begin, end)] if end <= numel else [(begin, numel), (0, end - numel)]


def cell_size(numel: int, size: int) -> int:
    """Neighbouring entries of which a scattered window of ``size`` entries takes one: all are taken in turn."""
    return math.ceil(numel / size)


def cell_rows(numel: int, cell: int, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The positions ``[begin, end)`` as rows ``(turn, first_cell, end_cell)``: these cells give their entry ``turn``.

    Positions count through the cells in every turn, and the last cell, which may be smaller, has fewer turns. Pieces
    are at most :data:`PIECE` cells long.
    """
    cells = math.ceil(numel / cell)
    last = numel - (cells - 1) * cell  # entries of the last cell
    while begin < end:
        if begin < last * cells:
            turn, column, columns = begin // cells, begin % cells, cells
        else:
            beyond = begin - last * cells
            turn, column, columns = last + beyond // (cells - 1), beyond % (cells - 1), cells - 1
        length = min(end - begin, columns - column, PIECE)
        yield turn, column, column + length
        begin += length


def scattered_entries(
    numel: int, cell: int, row: tuple[int, int, int], key: int, device: torch.device | None = None
) -> Tensor:
    """Flat indices of the entries that the cells of a row (see :func:`cell_rows`) give, ascending.

    Over all positions this is a permutation of the parameter's entries: each cell goes through its entries from a
    place of its own, drawn by a hash of the cell and ``key``. Nothing is stored and no generator is used.

    Args:
        numel: entries of the parameter.
        cell: entries per cell.
        row: turn, first cell and end cell.
        key: 31 bits that tell this parameter's permutation from others.
        device: of the result.

    Returns:
        int64, shape [end_cell - first_cell].
    """
    turn, begin, end = row
    index = torch.arange(begin, end, dtype=torch.int64, device=device)
    start = _hashed(index, key)
    stride = _coprime_to(cell)
    cells = math.ceil(numel / cell)
    last = numel - (cells - 1) * cell
    tail = (start[-1:] + turn).remainder_(last) if end == cells and last < cell else None
    start.add_(turn * stride % cell).remainder_(cell)
    if tail is not None:
        start[-1:] = tail
    return index.mul_(cell).add_(start)


def _hashed(values: Tensor, key: int) -> Tensor:
    """31 well-mixed bits of each of ``values``. The products stay below 2**62, so every device computes the same."""
    mixed = values.bitwise_xor(key).bitwise_and_(_MASK)
    for factor, shift in ((0x2C1B3C6D, 15), (0x297A2D39, 13)):
        mixed.mul_(factor).bitwise_and_(_MASK)
        mixed.bitwise_xor_(mixed >> shift)
    return mixed


def _coprime_to(cell: int) -> int:
    """A step that visits every entry of a cell before any twice, far from the one before."""
    step = max(1, round(cell * _GOLDEN))
    while math.gcd(step, cell) != 1:
        step += 1
    return step

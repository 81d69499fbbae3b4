"""Where a window lies in its flattened parameter, and how values get in and out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Protocol

import torch
from torch import Tensor

from badam.optim.window_entries import PIECE, cell_rows, cell_size, scattered_entries, window_ranges

MaskMode = Literal["adjacent", "scatter"]

FEWEST_RUNS = 256
"""A window is scattered in runs of neighbours only if it has at least so many of them."""


class Place(Protocol):
    """Some entries of a flat tensor, in a fixed order."""

    def read_into(self, values: Tensor, flat: Tensor) -> None:
        """Copy the entries of ``flat`` (shape [numel]) to ``values`` (shape [size]), converting the type."""

    def add_to(self, values: Tensor, flat: Tensor) -> None:
        """Add the entries of ``flat`` to ``values``."""

    def write(self, flat: Tensor, values: Tensor) -> None:
        """Copy ``values`` to the entries of ``flat``, rounding to nearest."""

    def views(self, flat: Tensor, values: Tensor) -> tuple[list[Tensor], list[Tensor]] | None:
        """Pairs of views such that copying ``values`` is copying the second to the first; None if there are none."""


class Ranges:
    """The range of entries that a visit trains; two of them where it goes round."""

    def __init__(self, numel: int, size: int, visit: int) -> None:
        self.parts: list[tuple[slice, slice]] = []
        begin = 0
        for first, end in window_ranges(numel, size, visit):
            self.parts.append((slice(begin, begin + end - first), slice(first, end)))
            begin += end - first

    def read_into(self, values: Tensor, flat: Tensor) -> None:
        for part, entries in self.parts:
            values[part].copy_(flat[entries])

    def add_to(self, values: Tensor, flat: Tensor) -> None:
        for part, entries in self.parts:
            values[part].add_(flat[entries])

    def write(self, flat: Tensor, values: Tensor) -> None:
        for part, entries in self.parts:
            flat[entries].copy_(values[part])

    def views(self, flat: Tensor, values: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return [flat[entries] for _, entries in self.parts], [values[part] for part, _ in self.parts]


class Scattered:
    """The entries that a visit trains, spread over the parameter by a permutation of its runs.

    A *run* is ``run`` neighbouring entries that are trained together: 16 of them fill the 32 bytes that memory
    transfers at once, so that nothing is moved that is not used.

    Args:
        numel: entries of the parameter.
        size: entries of the window; both are multiples of ``run``.
        visit: number of the visit, from 0.
        run: entries per run.
        key: 31 bits that tell this parameter's permutation from others.
        keep: keep the indices of the runs (4 B each) after their first use.
    """

    def __init__(self, numel: int, size: int, visit: int, *, run: int, key: int, keep: bool) -> None:
        self._runs, self._window_runs = numel // run, size // run
        self._visit, self._run, self._key, self._keep = visit, run, key, keep
        self._kept: list[Tensor] | None = None

    def read_into(self, values: Tensor, flat: Tensor) -> None:
        rows = self._rows(flat)
        for part, index in self._pieces(flat.device):
            self._rows(values)[part].copy_(rows.index_select(0, index))

    def add_to(self, values: Tensor, flat: Tensor) -> None:
        rows = self._rows(flat)
        for part, index in self._pieces(flat.device):
            self._rows(values)[part].add_(rows.index_select(0, index))

    def write(self, flat: Tensor, values: Tensor) -> None:
        rows, narrow = _in_words(self._rows(flat)), values.to(flat.dtype)
        for part, index in self._pieces(flat.device):
            source = self._rows(narrow)[part]
            rows.index_copy_(0, index.long(), source.view(rows.dtype) if rows.dtype != source.dtype else source)

    def views(self, flat: Tensor, values: Tensor) -> None:
        return None

    def _rows(self, flat: Tensor) -> Tensor:
        return flat if self._run == 1 else flat.view(-1, self._run)

    def _pieces(self, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        """Parts of the window's runs, each with the indices of its runs in the parameter."""
        if self._keep and self._kept is None:
            narrow = torch.int32 if self._runs <= 2**31 else torch.int64
            self._kept = list(torch.cat([index.to(narrow) for index in self._computed(device)]).split(PIECE))
        begin = 0
        for index in self._computed(device) if self._kept is None else self._kept:
            yield slice(begin, begin + index.numel()), index
            begin += index.numel()

    def _computed(self, device: torch.device) -> Iterator[Tensor]:
        cell = cell_size(self._runs, self._window_runs)
        for first, end in window_ranges(self._runs, self._window_runs, self._visit):
            for row in cell_rows(self._runs, cell, first, end):
                yield scattered_entries(self._runs, cell, row, self._key, device)


def _in_words(rows: Tensor) -> Tensor:
    """The same memory as 8-byte numbers where it is made of such: fewer and larger numbers are copied faster."""
    row_bytes, offset_bytes = rows.stride(0) * rows.itemsize, rows.storage_offset() * rows.itemsize
    whole = rows.dim() > 1 and row_bytes % 8 == 0 and offset_bytes % 8 == 0
    return rows.view(torch.int64) if whole else rows


def run_length(numel: int, size: int, longest: int) -> int:
    """Entries per run for a window of about ``size`` entries: a power of two that divides ``numel``.

    Small windows are scattered entry by entry: a few runs would be no scattering.
    """
    run = 1
    while run * 2 <= longest and numel % (run * 2) == 0 and size >= FEWEST_RUNS * run * 2:
        run *= 2
    return run

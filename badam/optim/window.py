"""One parameter's window: where it is, its fp32 master, its gradient, and writing back."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from badam.errors import InputError
from badam.optim.master import HALF_TYPES, MasterCopy
from badam.optim.window_entries import PIECE, cell_rows, cell_size, scattered_entries, window_ranges
from badam.optim.window_gradient import WindowGradient
from badam.tensors.functional import copy_nearest_, is_fake, round_stochastically_

MaskMode = Literal["adjacent", "scatter"]

FEWEST_RUNS = 256
"""A window is scattered in runs of neighbours only if it has at least so many of them."""

_TRAINABLE = (*HALF_TYPES, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class WindowOptions:
    """How windows lie in their parameters."""

    mask_mode: MaskMode = "adjacent"
    keep_index: bool = True  # keep the indices of a scattered window instead of computing them at each use
    longest_run: int = 16  # neighbouring entries that a scattered window may train together, a power of two


class Window(MasterCopy):
    """The share of one parameter that is trained now.

    Args:
        name: of the parameter in the model.
        parameter: the model's parameter, of any floating type and dense layout.
        size: entries in the window; a scattered one is rounded to whole runs.
        group: index of its parameter group.
        options: how it lies in the parameter.
    """

    master: nn.Parameter

    def __init__(self, name: str, parameter: nn.Parameter, size: int, group: int, options: WindowOptions) -> None:
        super().__init__(name, parameter)
        self.numel = parameter.numel()
        self.group = group
        scattered = options.mask_mode == "scatter" and size < self.numel
        self.run = run_length(self.numel, size, options.longest_run) if scattered else 0  # 0: adjacent
        self.size = round(size / self.run) * self.run if scattered else size
        order = _memory_order(name, parameter)
        self._order = order if order != sorted(order) else None  # None: as the dimensions are
        self._keep_index = options.keep_index
        self._place: Place = Ranges(self.numel, self.size, 0)
        self._views: tuple[int, list[Tensor], list[Tensor]] | None = None
        # Made empty: it is in the parameter groups before it is read from the model.
        master_dtype = torch.promote_types(parameter.dtype, torch.float32)
        self.master = nn.Parameter(torch.empty(self.size, dtype=master_dtype, device=parameter.device))

    # Where the window is

    def move(self, visit: int, seed: int) -> None:
        """Move to where visit number ``visit`` (from 0) trains; the master is not read."""
        if self.run:
            key = int.from_bytes(hashlib.sha256(f"{seed}:{self.name}".encode()).digest()[:4], "little") >> 1
            self._place = Scattered(self.numel, self.size, visit, run=self.run, key=key, keep=self._keep_index)
        else:
            self._place = Ranges(self.numel, self.size, visit)
        self._views = None
        self.is_loaded = False

    def flat(self, tensor: Tensor) -> Tensor:
        """``tensor``, of the parameter's shape, as one dimension in the parameter's memory order.

        A view if the tensor is dense and in that order, as the parameter is. For use without gradients.
        """
        if tensor.layout != torch.strided:
            tensor = tensor.to_dense()
        return tensor.reshape(-1) if self._order is None else tensor.permute(self._order).reshape(-1)

    def read(self, tensor: Tensor) -> Tensor:
        """The window's entries of ``tensor``: fp32, shape [size], sharing no memory with it."""
        values = torch.empty(self.size, dtype=self.master.dtype, device=tensor.device)
        self._place.read_into(values, self.flat(tensor))
        return values

    def add_to(self, values: Tensor, tensor: Tensor) -> None:
        """Add the window's entries of ``tensor`` to ``values``."""
        self._place.add_to(values, self.flat(tensor))

    def spread(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of the parameter's shape and strides with ``values`` in the window and zeros elsewhere."""
        dense = torch.zeros_like(self.parameter, dtype=dtype, requires_grad=False)
        self._place.write(self.flat(dense), values)
        return dense

    # Master

    def adopt_master(self, master: Tensor) -> None:
        """Use ``master`` (fp32, shape [size]), from which the current weights were rounded."""
        self.master.detach().copy_(master)
        self.mark_written()

    def _read_master(self) -> None:
        if self.master.device != self.parameter.device:  # the model was moved after the optimizer was built
            self.master.data = torch.empty_like(self.master, device=self.parameter.device)
        self._place.read_into(self.master.detach(), self.flat(self.parameter))

    def _weights_as_master(self) -> Tensor:
        return self.read(self.parameter)

    def _round_stochastically(self, generator: torch.Generator) -> None:
        rounded = torch.empty_like(self.master, dtype=self.parameter.dtype, requires_grad=False)
        round_stochastically_(rounded, self.master.detach(), generator)
        self._place.write(self.flat(self.parameter), rounded)

    # Gradient

    @property
    def gradient(self) -> Tensor | None:
        """The window's gradient: fp32, shape [size]; None if there is none, or the host has released it."""
        gradient = self.parameter.grad
        return gradient.window_values if isinstance(gradient, WindowGradient) and gradient.window is self else None

    def set_gradient(self, values: Tensor) -> None:
        """Let ``values`` be what the host finds, as the parameter's gradient and as the master's."""
        self.parameter.grad = WindowGradient(self, values)
        self.master.grad = values

    def drop_gradient(self) -> None:
        """Release the gradient."""
        self.parameter.grad = None
        self.master.grad = None

    # Writing back

    def views(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """Views of the weights and of the master that are alike; None if the window is not made of ranges."""
        pointer = 0 if is_fake(self.parameter) else self.parameter.data_ptr()
        if self._views is None or self._views[0] != pointer:
            pairs = self._place.views(self.flat(self.parameter), self.master.detach())
            if pairs is None:
                return None
            self._views = (pointer, *pairs)
        return self._views[1], self._views[2]

    def write_nearest(self) -> None:
        """Round the master into the model, to nearest."""
        self._place.write(self.flat(self.parameter), self.master.detach())
        self.mark_written()


def write_nearest(windows: list[Window]) -> None:
    """Round the masters of ``windows`` into the model, to nearest; ranges all at once, without temporaries."""
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for window in windows:
        views = window.views()
        if views is None:
            window.write_nearest()
        else:
            targets += views[0]
            sources += views[1]
    copy_nearest_(targets, sources)
    for window in windows:
        window.mark_written()


class Collector(Protocol):
    """Who wants the gradients."""

    def take_gradient(self, window: Window) -> None:
        """Take the gradient that autograd has just put at the window's parameter."""


def collect_gradients(collector: Collector, window: Window) -> None:
    """Let ``collector`` take the gradients of the window's parameter, in place of another one before it."""
    hooks = getattr(window.parameter, "_post_accumulate_grad_hooks", None) or {}
    for key in [key for key, hook in hooks.items() if isinstance(hook, _GradientHook)]:
        del hooks[key]
    window.parameter.register_post_accumulate_grad_hook(_GradientHook(collector, window))


class _GradientHook:
    """Tells the collector of a gradient, without keeping it alive."""

    def __init__(self, collector: Collector, window: Window) -> None:
        self.collector = weakref.ref(collector)
        self.window = weakref.ref(window)

    def __call__(self, _parameter: Tensor) -> None:
        collector, window = self.collector(), self.window()
        if collector is not None and window is not None:
            collector.take_gradient(window)


def _memory_order(name: str, parameter: Tensor) -> list[int]:
    """Dimensions from the outermost in memory inwards, in which the parameter is one contiguous stretch."""
    strides = [parameter.stride(dim) for dim in range(parameter.dim())]
    order = sorted(range(parameter.dim()), key=lambda dim: (-strides[dim], dim))
    dense = parameter.layout == torch.strided and parameter.detach().permute(order).is_contiguous()
    if not dense or parameter.dtype not in _TRAINABLE or is_traceable_wrapper_subclass(parameter):
        raise InputError(
            f"The parameter {name} ({type(parameter).__name__}, {parameter.dtype}, shape {tuple(parameter.shape)}, "
            f"strides {strides}) cannot be trained by windows: it must be an ordinary dense tensor of a 16-, 32- or "
            "64-bit floating type on one device.",
            advice="Leave it out of param_groups, or freeze it.",
        )
    return order


class Place(Protocol):
    """Where a window lies in its flattened parameter: some entries of it, in a fixed order."""

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
        offset = 0
        for begin, end in window_ranges(numel, size, visit):
            self.parts.append((slice(offset, offset + end - begin), slice(begin, end)))
            offset += end - begin

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
        rows, rounded = _in_words(self._rows(flat)), values.to(flat.dtype)
        for part, index in self._pieces(flat.device):
            source = self._rows(rounded)[part]
            rows.index_copy_(0, index.long(), source.view(rows.dtype) if rows.dtype != source.dtype else source)

    def views(self, flat: Tensor, values: Tensor) -> None:
        return None

    def _rows(self, flat: Tensor) -> Tensor:
        return flat if self._run == 1 else flat.view(-1, self._run)

    def _pieces(self, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        """Parts of the window's runs, each with the indices of its runs in the parameter."""
        if self._keep and self._kept is None:
            dtype = torch.int32 if self._runs <= 2**31 else torch.int64
            self._kept = list(torch.cat([index.to(dtype) for index in self._computed(device)]).split(PIECE))
        begin = 0
        for index in self._computed(device) if self._kept is None else self._kept:
            yield slice(begin, begin + index.numel()), index
            begin += index.numel()

    def _computed(self, device: torch.device) -> Iterator[Tensor]:
        cell = cell_size(self._runs, self._window_runs)
        for begin, end in window_ranges(self._runs, self._window_runs, self._visit):
            for row in cell_rows(self._runs, cell, begin, end):
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

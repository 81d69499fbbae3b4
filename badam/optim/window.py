"""One parameter's window: where it is, its fp32 master, its gradient, and writing back."""

from __future__ import annotations

import hashlib
import weakref
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from badam.errors import InputError
from badam.optim.places import MaskMode, Place, Ranges, Scattered, run_length
from badam.optim.window_gradient import WindowGradient
from badam.tensors.functional import copy_nearest_, is_fake, is_rounding_of, round_stochastically_

_WIDE = (torch.float32, torch.float64)
_TRAINABLE = (torch.bfloat16, torch.float16, *_WIDE)


@dataclass(frozen=True, slots=True)
class WindowOptions:
    """How windows lie in their parameters."""

    mask_mode: MaskMode = "adjacent"
    keep_index: bool = True  # keep the indices of a scattered window instead of computing them at each use
    longest_run: int = 16  # neighbouring entries that a scattered window may train together, a power of two


class Window:
    """The share of one parameter that is trained now.

    The master is made empty, to be read from the model when it is first needed and not before: whoever loads a
    checkpoint into the model after the optimizer was built must not have it overwritten.

    Args:
        name: of the parameter in the model.
        parameter: the model's parameter, of any floating type and dense layout.
        size: entries in the window; a scattered one is rounded to whole runs.
        group: index of its parameter group.
        options: how it lies in the parameter.
    """

    def __init__(self, name: str, parameter: nn.Parameter, size: int, group: int, options: WindowOptions) -> None:
        self.name = name
        self.parameter = parameter
        self.numel = parameter.numel()
        self.group = group
        scattered = options.mask_mode == "scatter" and size < self.numel
        self.run = run_length(self.numel, size, options.longest_run) if scattered else 0  # 0: adjacent
        self.size = round(size / self.run) * self.run if scattered else size
        self.is_loaded = False
        order = _memory_order(name, parameter)
        self._order = order if order != sorted(order) else None  # None: as the dimensions are
        self._keep_index = options.keep_index
        self._place: Place = Ranges(self.numel, self.size, 0)
        self._views: tuple[int, list[Tensor], list[Tensor]] | None = None
        self._written_version = -1
        wide = torch.promote_types(parameter.dtype, torch.float32)
        self.master = nn.Parameter(torch.empty(self.size, dtype=wide, device=parameter.device))

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

    def ready_master(self) -> None:
        """Read the master from the model if that was not done, or if someone changed the weights since.

        A weight within one unit of the last place of its master counts as unchanged: it is the master, rounded, as
        a checkpoint holds it that is loaded into the model after the optimizer's state.
        """
        if self.is_loaded and self._is_as_written():
            return
        if not self.is_loaded:
            if self.master.device != self.parameter.device:  # the model was moved after the optimizer was built
                self.master.data = torch.empty_like(self.master, device=self.parameter.device)
            self._place.read_into(self.master.detach(), self.flat(self.parameter))
            self.is_loaded = True
        elif not is_rounding_of(values := self.read(self.parameter), self.master.detach(), self.parameter.dtype):
            self.master.detach().copy_(values)
        self._mark_written()

    def adopt_master(self, master: Tensor) -> None:
        """Use ``master`` (fp32, shape [size]), from which the current weights were rounded."""
        self.master.detach().copy_(master)
        self.is_loaded = True
        self._mark_written()

    def _is_as_written(self) -> bool:
        return is_fake(self.parameter) or self.parameter._version == self._written_version

    def _mark_written(self) -> None:
        self._written_version = 0 if is_fake(self.parameter) else self.parameter._version

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

    def write_stochastically(self, generator: torch.Generator) -> None:
        """Round the master into the model without bias, unless someone has changed the weights since."""
        if self.parameter.dtype in _WIDE or not self.is_loaded or not self._is_as_written():
            return
        rounded = torch.empty_like(self.master, dtype=self.parameter.dtype, requires_grad=False)
        round_stochastically_(rounded, self.master.detach(), generator)
        self._place.write(self.flat(self.parameter), rounded)
        self._mark_written()

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
        self._mark_written()


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
        window._mark_written()


class Collector(Protocol):
    """Who wants the gradients."""

    def collect(self, window: Window) -> None:
        """Take the gradient that autograd has just put at the window's parameter."""


def collect_gradients(collector: Collector, window: Window) -> None:
    """Let ``collector`` collect the gradients of the window's parameter, in place of another one before it."""
    hooks = getattr(window.parameter, "_post_accumulate_grad_hooks", None) or {}
    for key in [key for key, hook in hooks.items() if isinstance(hook, _CollectHook)]:
        del hooks[key]
    window.parameter.register_post_accumulate_grad_hook(_CollectHook(collector, window))


class _CollectHook:
    """Tells the collector of a gradient, without keeping it alive."""

    def __init__(self, collector: Collector, window: Window) -> None:
        self.collector = weakref.ref(collector)
        self.window = weakref.ref(window)

    def __call__(self, _parameter: Tensor) -> None:
        collector, window = self.collector(), self.window()
        if collector is not None and window is not None:
            collector.collect(window)


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

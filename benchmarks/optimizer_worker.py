"""One side of the comparison in ``optimizer_step.py``, in a process of its own.

Asked by :mod:`benchmarks.two_sides` with a measurement's name and how often; answers with a list of numbers: CPU
seconds of this process, which other work on the machine hardly lengthens, or bytes per active parameter.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.two_sides import answer

SHAPES = ((1024, 1024),) * 4 + ((2816, 1024),) * 2 + ((1024, 2816),) + ((1024,),) * 2
"""One layer of a Llama of hidden size 1024: 12.8 M entries."""

LEARNING_RATE = 1e-5
FOREVER = 10**9


class HandOut(torch.autograd.Function):
    """A scalar whose backward costs nothing and hands one weight a gradient that nobody else holds."""

    @staticmethod
    def forward(context: Any, gradient: Tensor, allocate: bool, weight: Tensor) -> Tensor:
        context.gradient, context.allocate = gradient, allocate
        return torch.zeros(())

    @staticmethod
    def backward(context: Any, *_: Tensor) -> tuple[Any, ...]:
        return (None, None, context.gradient.clone() if context.allocate else context.gradient.detach())


class Layer(nn.Module):
    """bf16 parameters of the shapes above, with fixed gradients."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES]
        self.weights = nn.ParameterList(nn.Parameter(weight) for weight in drawn)
        self.gradients = [torch.randn(shape, generator=generator).bfloat16() * 1e-3 for shape in SHAPES]

    def backward(self, *, allocate: bool = False) -> None:
        """Give one weight after the other its gradient, as a backward does."""
        pairs = zip(self.gradients, self.weights, strict=True)
        torch.autograd.backward([HandOut.apply(gradient, allocate, weight) for gradient, weight in pairs])


class Model(nn.Module):
    """Two equal blocks, so that there is another one to switch to."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))


def seconds(action: Callable[[], Any]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    action()
    return time.process_time() - start


def highest_allocation(action: Callable[[], Any]) -> int:
    """By how many bytes the allocator's account rises at most during a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


class Side:
    """What both sides have: bare fused AdamW on fp32 tensors, and the optimizer under comparison on bf16."""

    def __init__(self) -> None:
        layer = Layer()
        self.bare_weights = [nn.Parameter(weight.detach().float()) for weight in layer.weights]
        self.bare = torch.optim.AdamW(self.bare_weights, lr=LEARNING_RATE, fused=True)
        self.gradients = [gradient.float() for gradient in layer.gradients]
        self.plain = layer
        self.made: dict[str, tuple[Model, Any]] = {}

    def bare_step(self) -> float:
        """Fused AdamW on fp32 tensors whose gradients are there."""
        for weight, gradient in zip(self.bare_weights, self.gradients, strict=True):
            weight.grad = gradient
        return seconds(self.bare.step)

    def copy_to_fp32(self) -> float:
        """Copy the block to fp32 once."""
        layer = self.optimizer("copy")[0].layers[0]
        return seconds(lambda: [weight.detach().float() for weight in layer.weights])

    def optimizer(self, name: str, *, rate: float = LEARNING_RATE, **options: Any) -> tuple[Model, Any]:
        """The optimizer under comparison over a model of its own, made on first use."""
        if name not in self.made:
            block_optimizer = importlib.import_module("badam").BlockOptimizer
            model = Model()
            base = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
            settings = {"switch_block_every": FOREVER, "switch_mode": "ascending", "verbose": 0, **options}
            blocks = [["layers.0."], ["layers.1."]]
            self.made[name] = model, block_optimizer(base, list(model.named_parameters()), blocks, **settings)
        return self.made[name]

    def _live_bytes(
        self, name: str, held: Callable[[Any], list[Tensor]], *, in_backward: bool, **options: Any
    ) -> float:
        """Bytes above the weights at the step's peak, per active parameter, in the steady state."""
        model, optimizer = self.optimizer(name, **options)
        layer = model.layers[0]

        def backward() -> None:
            layer.backward(allocate=True)

        backward()
        optimizer.step()
        if in_backward:
            highest = highest_allocation(backward)
            optimizer.step()
            standing = held(optimizer)
        else:
            backward()
            standing = [*held(optimizer), *(weight.grad for weight in layer.weights if weight.grad is not None)]
            highest = highest_allocation(optimizer.step)
        total = sum(tensor.untyped_storage().nbytes() for tensor in standing) + highest
        return total / sum(weight.numel() for weight in layer.weights)

    def _retained(self, name: str, **options: Any) -> float:
        """How much of 50 steps at a rate of 1e-6 is in the weights after the switch, relative to fp32."""
        self.made.clear()
        model, optimizer = self.optimizer(name, rate=1e-6, **options)
        layer = model.layers[0]
        before = layer.weights[0].detach().float()
        wide = nn.Parameter(before.clone())
        reference = torch.optim.AdamW([wide], lr=1e-6, weight_decay=0.0)
        for _ in range(50):
            layer.backward()
            optimizer.step()
            wide.grad = layer.gradients[0].float()
            reference.step()
        optimizer.switch_trainable_params(verbose=0)
        direction = wide.detach() - before
        moved = layer.weights[0].detach().float() - before
        self.made.clear()
        return float((moved * direction).sum() / (direction * direction).sum())


class Old(Side):
    """badam 1.4."""

    def step(self) -> float:
        """From bf16 gradients that backward has left to updated bf16 weights."""
        model, optimizer = self.optimizer("step")
        model.layers[0].backward()
        return seconds(optimizer.step)

    def switch(self) -> float:
        """Leave a block, enter the other one, masters included."""
        _, optimizer = self.optimizer("switch")
        return seconds(lambda: optimizer.switch_trainable_params(verbose=0))

    def live_bytes(self) -> float:
        """See :meth:`Side._live_bytes`."""

        def held(optimizer: Any) -> list[Tensor]:
            moments = [t for entry in optimizer.base_optimizer.state.values() for t in entry.values() if t.dim()]
            return [*optimizer.param_idx2hp.values(), *moments]

        return self._live_bytes("live", held, in_backward=False)

    def retained(self) -> float:
        """See :meth:`Side._retained`."""
        return self._retained("retained")


class New(Side):
    """This project."""

    def step(self) -> float:
        """From gradients that backward has left (accumulated in fp32) to updated bf16 weights."""
        return self._step("base")[1]

    def backward_and_step(self) -> float:
        """The same with backward's share: conversion and accumulation in fp32."""
        return sum(self._step("base"))

    def compiled_step(self) -> float:
        """``step`` with ``update="compiled"``."""
        return self._step("compiled", update="compiled")[1]

    def backward_and_compiled_step(self) -> float:
        """``backward_and_step`` with ``update="compiled"``."""
        return sum(self._step("compiled", update="compiled"))

    def _step(self, name: str, **options: Any) -> tuple[float, float]:
        """Backward's share, which is what its backward takes longer than that of a layer nobody collects from."""
        model, optimizer = self.optimizer(name, **options)
        alone = seconds(lambda: self.plain.backward(allocate=True))
        for weight in self.plain.weights:
            weight.grad = None
        return seconds(lambda: model.layers[0].backward(allocate=True)) - alone, seconds(optimizer.step)

    def switch(self) -> float:
        """Leave a block (rounded to nearest), enter the other one, and make its masters."""
        return self._switch("nearest")

    def stochastic_switch(self) -> float:
        """The same with stochastic write-back."""
        return self._switch("stochastic")

    def _switch(self, write_back: str) -> float:
        model, optimizer = self.optimizer(write_back, write_back=write_back)
        model.layers[optimizer.current_block_idx].backward()
        optimizer.step()  # so that there is something to leave

        def action() -> None:
            optimizer.switch_trainable_params()
            for member in optimizer.active_parameters:
                member.ready_master()

        return seconds(action)

    def live_bytes(self) -> float:
        """See :meth:`Side._live_bytes`."""
        return self._live_bytes("base", self._held, in_backward=False)

    def compiled_live_bytes(self) -> float:
        """The same with ``update="compiled"``."""
        return self._live_bytes("compiled", self._held, in_backward=False, update="compiled")

    def release_live_bytes(self) -> float:
        """The same with ``gradient_release=True``, less the fp32 and bf16 gradient of the largest tensor."""
        largest = max(gradient.numel() for gradient in self.gradients)
        total = sum(gradient.numel() for gradient in self.gradients)
        return self._live_bytes("release", self._held, in_backward=True, gradient_release=True) - 6 * largest / total

    @staticmethod
    def _held(optimizer: Any) -> list[Tensor]:
        moments = [t for entry in optimizer.state.values() for t in entry.values() if t.dim()]
        hidden = [m.gradient for m in optimizer.active_parameters if m.hides_gradient and m.gradient is not None]
        return [*optimizer.masters.values(), *moments, *hidden]

    def retained(self) -> float:
        """See :meth:`Side._retained`; stochastic write-back."""
        return self._retained("retained", write_back="stochastic")

    def nearest_retained(self) -> float:
        """The same with write-back to nearest."""
        return self._retained("retained", write_back="nearest")


def main() -> None:
    """Answer requests: a measurement's name, and how often."""
    with contextlib.redirect_stdout(sys.stderr):
        side = {"old": Old, "new": New}[sys.argv[1]]()

    def measure(request: str) -> list[float]:
        name, count = request.split()
        return [getattr(side, name)() for _ in range(int(count))]

    answer(measure)


if __name__ == "__main__":
    main()

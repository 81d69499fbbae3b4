"""One side of a comparison of optimizers, in a process of its own; driven by ``optimizer_bench.py``.

badam 1.4 and this project are the same import package, so each side has its own process and ``PYTHONPATH``. The
parent writes the name of a measurement to standard input, this process answers with one number: CPU seconds of this
process, which other work on the machine does not lengthen, or bytes.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SHAPES = ((1024, 1024),) * 4 + ((2816, 1024),) * 2 + ((1024, 2816),) + ((1024,),) * 2
"""One layer of a Llama of hidden size 1024: 12.8 M entries."""

LEARNING_RATE = 1e-5
FOREVER = 10**9


class Layer(nn.Module):
    """Parameters of the shapes above, with fixed gradients that a backward hands out."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in SHAPES
        )
        self.gradients = [torch.randn(shape, generator=generator).bfloat16() * 1e-3 for shape in SHAPES]

    def forward(self) -> Tensor:
        """A scalar whose backward costs nothing and gives every parameter its gradient."""
        return HandOut.apply(self.gradients, *self.weights)


class HandOut(torch.autograd.Function):
    """Hands each input a gradient as a backward would: a tensor that nobody else holds."""

    @staticmethod
    def forward(context: Any, gradients: list[Tensor], *weights: Tensor) -> Tensor:
        context.gradients = gradients
        return torch.zeros(())

    @staticmethod
    def backward(context: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(gradient.detach() for gradient in context.gradients))


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


class Side:
    """What both sides have: bare fused AdamW on fp32 tensors, and the optimizer under comparison on bf16."""

    def __init__(self) -> None:
        layer = Layer()
        self.bare_weights = [nn.Parameter(weight.detach().float()) for weight in layer.weights]
        self.bare = torch.optim.AdamW(self.bare_weights, lr=LEARNING_RATE, fused=True)
        self.gradients = [gradient.float() for gradient in layer.gradients]
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

    def optimizer(self, name: str, **options: Any) -> tuple[Model, Any]:
        """The optimizer under comparison over a model of its own, made on first use."""
        if name not in self.made:
            block_optimizer = importlib.import_module("badam").BlockOptimizer
            model = Model()
            base = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
            settings = {"switch_block_every": FOREVER, "switch_mode": "ascending", "verbose": 0, **options}
            with contextlib.redirect_stdout(sys.stderr):
                made = block_optimizer(base, list(model.named_parameters()), [["layers.0."], ["layers.1."]], **settings)
            self.made[name] = model, made
        return self.made[name]


class Old(Side):
    """badam 1.4."""

    def step(self) -> float:
        """From bf16 gradients that are there to updated bf16 weights."""
        model, optimizer = self.optimizer("step")
        for weight, gradient in zip(model.layers[0].weights, model.layers[0].gradients, strict=True):
            weight.grad = gradient
        return seconds(optimizer.step)

    def switch(self) -> float:
        """Leave a block, enter the other one, masters included."""
        _, optimizer = self.optimizer("switch")
        with contextlib.redirect_stdout(sys.stderr):
            return seconds(lambda: optimizer.switch_trainable_params(verbose=0))


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

    def backward_with_release(self) -> float:
        """``backward_and_step`` with ``gradient_release=True``, which steps within backward."""
        return sum(self._step("release", gradient_release=True))

    def _step(self, name: str, **options: Any) -> tuple[float, float]:
        model, optimizer = self.optimizer(name, **options)
        return seconds(lambda: model.layers[0]().backward()), seconds(optimizer.step)

    def switch(self) -> float:
        """Leave a block (rounding to nearest), enter the other one, and make its masters."""
        return self._switch("nearest")

    def stochastic_switch(self) -> float:
        """The same with stochastic write-back."""
        return self._switch("stochastic")

    def _switch(self, write_back: str) -> float:
        _, optimizer = self.optimizer(write_back, write_back=write_back)

        def action() -> None:
            optimizer.switch_trainable_params()
            for member in optimizer.active_parameters:
                member.ready_master()

        return seconds(action)


def main() -> None:
    """Answer measurements until standard input ends."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    side = Old() if os.environ["SIDE"] == "old" else New()
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            result = getattr(side, line.strip())()
        print(result, flush=True)


if __name__ == "__main__":
    main()

"""One side of the comparison in ``ratio_step.py``, in a process of its own.

Asked by :mod:`benchmarks.two_sides` with a case, ``SHAPES MODE``; answers with CPU seconds and bytes of a few steps.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

import badam
from benchmarks.two_sides import answer

RATIO = 0.05
BURST = 10
"""Steps of one side before the other has its turn: training is not interrupted at every step either."""
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "layer": ((1024, 1024),) * 4 + ((2384, 1024),) * 2 + ((1024, 2384),) + ((1024,),) * 2,
    "model": (((320, 320),) * 4 + ((864, 320),) * 3 + ((320,),) * 2) * 9 + ((640, 320), (320,)),
}


class Side:
    """A ratio optimizer over parameters whose gradients appear as after a backward."""

    def __init__(self, shapes: str, mode: str) -> None:
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES[shapes]]
        self.weights: list[Any] = [torch.nn.Parameter(weight) for weight in drawn]
        self.gradients = [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES[shapes]]
        options: dict[str, Any] = {"mask_mode": mode.partition("-")[0], "switch_every": 10**9, **self.options(mode)}
        self.optimizer: Any = badam.BlockOptimizerRatio(
            self.weights,
            [(f"layers.0.{index}", weight) for index, weight in enumerate(self.weights)],
            update_ratio=RATIO,
            verbose=0,
            include_embedding=True,
            include_lm_head=True,
            **options,
        )

    def options(self, mode: str) -> dict[str, Any]:
        """Options that only one side has."""
        return {}

    def collect(self) -> None:
        """What happens to the gradients in backward."""
        raise NotImplementedError

    def held(self) -> list[Any]:
        """Tensors that exist because of the active entries, between backward and step."""
        raise NotImplementedError

    def measure(self) -> dict[str, float]:
        """CPU seconds of backward's share and of the step, and bytes per active entry."""
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            weight.grad = gradient.detach()  # neither side writes into it
        start = time.process_time()
        self.collect()
        collected = time.process_time()
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in self.held()}
        stored = sum(storage.nbytes() for storage in storages.values())
        before_step = time.process_time()
        self.optimizer.step()
        stepped = time.process_time()
        return {"backward": collected - start, "step": stepped - before_step, "bytes": stored / self.active()}

    def active(self) -> int:
        """Entries that are trained at a time."""
        raise NotImplementedError


class Old(Side):
    """badam 1.4."""

    def collect(self) -> None:
        for weight in self.weights:
            self.optimizer.sparse_hook(weight)

    def active(self) -> int:
        return sum(int(weight.grad._values().numel()) for weight in self.weights)

    def held(self) -> list[Any]:
        sparse = [weight.grad for weight in self.weights]
        sparse += [mask for mask in self.optimizer.mask_dict.values() if mask is not None]
        moments = [
            t for entry in self.optimizer.state.values() for t in entry.values() if hasattr(t, "untyped_storage")
        ]
        return [part for tensor in sparse for part in (tensor._indices(), tensor._values())] + moments


class New(Side):
    """This project."""

    def options(self, mode: str) -> dict[str, Any]:
        return {"scatter_run": 1} if mode == "scatter-1" else {}

    def collect(self) -> None:
        for window in self.optimizer.windows:
            self.optimizer.take_gradient(window)

    def active(self) -> int:
        return int(self.optimizer.active_numel)

    def held(self) -> list[Any]:
        windows = self.optimizer.windows
        moments = [
            t for entry in self.optimizer.state.values() for t in entry.values() if hasattr(t, "untyped_storage")
        ]
        indices = [index for window in windows for index in getattr(window._place, "_kept", None) or []]
        return [t for window in windows for t in (window.master, window.gradient)] + moments + indices


def main() -> None:
    """Answer requests: which shapes, and which mode."""
    side = {"old": Old, "new": New}[sys.argv[1]]
    made: dict[str, Side] = {}

    def measure(case: str) -> list[dict[str, float]]:
        if case not in made:
            made.clear()
            made[case] = side(*case.split())
        return [made[case].measure() for _ in range(BURST)]

    answer(measure)


if __name__ == "__main__":
    main()

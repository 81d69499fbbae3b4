"""A network of two matrices, and short ways to train windows of it with the ratio optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from badam.optim.ratio import BlockOptimizerRatio

MODES = ("adjacent", "scatter")


class Net(nn.Module):
    """Two matrices with biases; ``loss`` differs from seed to seed."""

    def __init__(self, width: int = 24, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(width, width, dtype=dtype)
        self.second = nn.Linear(width, width, dtype=dtype)

    def loss(self, seed: int) -> Tensor:
        batch = torch.randn(4, self.first.in_features, generator=torch.Generator().manual_seed(seed))
        output: Tensor = self.second(torch.tanh(self.first(batch.to(self.first.weight.dtype))))
        return output.float().square().mean()


def net(dtype: torch.dtype = torch.bfloat16) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def build(model: nn.Module, **options: Any) -> BlockOptimizerRatio:
    settings = {"update_ratio": 0.1, "switch_every": 3, "preserve_threshold": 10, "lr": 1e-2, "verbose": 0}
    return BlockOptimizerRatio(list(model.parameters()), model.named_parameters(), **{**settings, **options})


def train(model: Net, optimizer: BlockOptimizerRatio, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        model.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: (before[name] != after[name]).flatten().nonzero().flatten().tolist() for name in before}

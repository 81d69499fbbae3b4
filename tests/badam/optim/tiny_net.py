"""A network small enough to compare every bit of it, and short ways to build optimizers on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from badam import BlockOptimizer

LR = 1e-2
WIDTH = 8


class Layer(nn.Module):
    """A linear part, a norm and a part that only odd inputs use, like an expert that a router may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.expert = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden: Tensor, routed: bool) -> Tensor:
        mixed = self.linear(self.norm(hidden))
        return hidden + (self.expert(mixed) if routed else mixed)


class Net(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, inputs: Tensor, routed: bool = True) -> Tensor:
        hidden = self.embed(inputs)
        for layer in self.layers:
            hidden = layer(hidden, routed)
        return self.head(hidden)


def net(dtype: torch.dtype = torch.bfloat16, layers: int = 3) -> Net:
    torch.manual_seed(0)
    return Net(layers).to(dtype)


def batch(seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loss_of(model: Net, seed: int, routed: bool = True) -> Tensor:
    return model(batch(seed, model.head.weight.dtype), routed).float().square().mean()


def adamw(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, **{"lr": LR, **options})


def blocks(model: nn.Module, base: torch.optim.Optimizer | None = None, **options: Any) -> BlockOptimizer:
    settings = {"switch_mode": "ascending", "verbose": 0, **options}
    return BlockOptimizer(base or adamw(model.parameters()), list(model.named_parameters()), **settings)


class FilledWhenBuilt(torch.optim.Optimizer):
    """Makes its state in the constructor, as torch's Adagrad did before 2.12."""

    def __init__(self, params: Any, lr: float = LR, start: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "start": start})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["sum"] = torch.full_like(parameter, start)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                total = self.state[parameter]["sum"].add_(parameter.grad * parameter.grad)
                parameter.addcdiv_(parameter.grad, total.sqrt() + 1e-8, value=-group["lr"])


class CountingSGD(torch.optim.SGD):
    """Counts its steps in the group, as schedule-free optimizers do, and divides the rate by the count."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"] / group["count"])

"""A network of layers that count their calls by phase, and its gradients with and without checkpointing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from badam import phases
from badam.vocabulary import Phase

LAYERS = 4


class Layer(nn.Module):
    """A plain layer with positional, keyword and nested arguments, that counts its calls by phase."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.calls: list[Phase] = []

    def forward(self, x: torch.Tensor, *, scale: tuple[torch.Tensor, float]) -> tuple[torch.Tensor, dict[str, object]]:
        self.calls.append(phases.current())
        return x + self.dropout(torch.tanh(self.linear(x))) * scale[0] * scale[1], {"calls": len(self.calls)}


class Net(nn.Module):
    def __init__(self, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.layers = nn.ModuleList(Layer(width, dropout) for _ in range(LAYERS))
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x, _ = layer(x, scale=(self.scale, 0.5))
        loss: torch.Tensor = x.square().mean()
        return loss


def net(dropout: float = 0.0) -> Net:
    torch.manual_seed(0)
    return Net(dropout=dropout)


TOKENS = torch.arange(12).reshape(2, 6)
ALL = [f"layers.{index}" for index in range(LAYERS)]


def activate(model: nn.Module, *prefixes: str) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(name.startswith(prefix) for prefix in prefixes))


def backward(model: nn.Module, loss: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    with phases.within(Phase.FORWARD):
        value = loss()
    with phases.within(Phase.BACKWARD):
        value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_bitwise_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert expected
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def recomputed(model: Net) -> list[int]:
    """Layers that ran forward once more in the recompute phase; clears the record."""
    counts = [layer.calls.count(Phase.RECOMPUTE) for layer in model.layers]
    for layer in model.layers:
        assert layer.calls.count(Phase.FORWARD) == 1
        assert Phase.BACKWARD not in layer.calls
        layer.calls.clear()
    assert max(counts) <= 1
    return [index for index, count in enumerate(counts) if count]

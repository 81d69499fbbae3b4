"""The linear layer for weights that are taken apart between forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from badam.distributed.deepspeed.linear import linear, linear_for_parameters


def results(function: Callable[..., Tensor], trains: bool, with_bias: bool, again: bool) -> list[Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=with_bias, dtype=torch.float64).requires_grad_(trains)
    inputs = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)

    def compute(rows: Tensor) -> Tensor:
        return torch.tanh(function(rows, layer.weight, layer.bias))

    output = checkpoint(compute, inputs, use_reentrant=False) if again else compute(inputs)
    output.square().sum().backward()
    gradients = [parameter.grad for parameter in (inputs, *layer.parameters())]
    return [output.detach(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_output_and_gradients_are_torchs(trains: bool, with_bias: bool, again: bool) -> None:
    found, expected = (results(each, trains, with_bias, again) for each in (linear, nn.functional.linear))
    assert len(found) == len(expected) == 2 + trains * (1 + with_bias)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("trains", "saved"), [(False, 0), (True, 1)])
def test_the_input_is_kept_for_a_weight_that_is_trained_and_the_weight_never(trains: bool, saved: int) -> None:
    layer = nn.Linear(6, 4, bias=False).requires_grad_(trains)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear(torch.randn(3, 6, requires_grad=True), layer.weight)
    assert [tuple(tensor.shape) for tensor in kept] == [(3, 6)] * saved


def test_a_weight_that_is_emptied_after_forward_takes_its_memory_along() -> None:
    layer = nn.Linear(6, 4, bias=False).requires_grad_(False)
    whole = layer.weight.data
    inputs = torch.randn(3, 6, requires_grad=True)
    output = linear(inputs, layer.weight)
    layer.weight.data = torch.empty(0)
    layer.weight.data = whole * 2  # as it is gathered anew for backward
    output.sum().backward()
    torch.testing.assert_close(inputs.grad, (whole * 2).sum(0).expand(3, 6))


def test_modules_compute_with_it_inside_and_with_torchs_outside() -> None:
    layer, usual = nn.Linear(6, 4), nn.functional.linear
    with linear_for_parameters():
        inside = layer(torch.ones(2, 6, requires_grad=True))
        assert "_Linear" in type(inside.grad_fn).__name__
    assert nn.functional.linear is usual
    torch.testing.assert_close(inside, layer(torch.ones(2, 6)))

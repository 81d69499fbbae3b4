from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from badam.errors import InputError
from badam.optim.window import MaskMode, Window, WindowOptions
from badam.optim.window_gradient import WindowGradient
from badam.tensors.functional import clip_gradients_


def window(dtype: torch.dtype = torch.bfloat16, mask_mode: MaskMode = "adjacent") -> Window:
    made = Window("weight", nn.Parameter(torch.zeros(6, 5, dtype=dtype)), 8, 0, WindowOptions(mask_mode))
    made.move(1, 0)
    return made


def gradient() -> WindowGradient:
    return WindowGradient(window(), torch.arange(1.0, 9.0))


def test_it_looks_like_the_parameters_gradient_and_holds_the_window() -> None:
    found = gradient()
    assert found.shape == (6, 5)
    assert found.dtype == torch.bfloat16
    assert found.untyped_storage().nbytes() == 0
    assert repr(found) == "WindowGradient(8 of 30 entries of shape (6, 5))"
    dense = found.dense()
    assert type(dense) is Tensor
    assert dense.flatten().tolist() == [0.0] * 8 + [1, 2, 3, 4, 5, 6, 7, 8] + [0.0] * 14


@pytest.mark.parametrize("mask_mode", ["adjacent", "scatter"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autograd_adds_to_the_window(mask_mode: MaskMode, dtype: torch.dtype) -> None:
    place = window(dtype, mask_mode=mask_mode)
    parameter = place.parameter
    parameter.grad = WindowGradient(place, torch.zeros(8))
    weights = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for _ in range(3):
        (parameter * weights).sum().backward()
    assert isinstance(parameter.grad, WindowGradient)
    torch.testing.assert_close(parameter.grad.window_values, 3 * place.read(weights))


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
def test_norms_are_those_of_the_window(order: float) -> None:
    found = torch.linalg.vector_norm(gradient(), order)
    torch.testing.assert_close(found, torch.linalg.vector_norm(torch.arange(1.0, 9.0), order))


def test_a_norm_that_zeros_matter_to_sees_them() -> None:
    assert torch.linalg.vector_norm(gradient(), -math.inf) == 0
    assert torch.linalg.vector_norm(gradient(), dim=1).tolist()[0] == 0


@pytest.mark.parametrize(
    ("change", "factor"),
    [
        (lambda g: g.mul_(2), 2.0),
        (lambda g: g.mul_(torch.tensor(2.0)), 2.0),
        (lambda g: g.div_(0.5), 2.0),
        (lambda g: torch._foreach_mul_([g], 2.0), 2.0),
        (lambda g: torch._foreach_mul_([g], torch.tensor(2.0)), 2.0),
        (lambda g: clip_gradients_([g], math.sqrt(204) / 2), 0.5),
    ],
)
def test_scaling_happens_in_place_in_fp32(change: Callable[[Tensor], object], factor: float) -> None:
    found = gradient()
    values = found.window_values
    values.mul_(1 + 2**-12)  # not a bf16 number
    expected = values * factor
    change(found)
    assert found.window_values is values
    torch.testing.assert_close(values, expected, rtol=1e-3, atol=0)
    assert not torch.equal(values, values.bfloat16().float())


def test_clamping_by_value_and_zeroing() -> None:
    found = nn.Parameter(torch.zeros(6, 5, dtype=torch.bfloat16))
    found.grad = gradient()
    torch.nn.utils.clip_grad_value_([found], 3.0)
    assert found.grad.window_values.tolist() == [1, 2, 3, 3, 3, 3, 3, 3]
    found.grad.zero_()
    assert not found.grad.window_values.any()


def test_everything_else_sees_the_dense_gradient() -> None:
    found = gradient()
    assert found.abs().max() == 8
    assert found.sum() == 36
    assert torch.equal(found + 1, found.dense() + 1)
    assert torch.equal(found.float(), found.dense().float())
    assert type(found * 2) is Tensor


def test_a_clone_is_independent_and_a_detached_one_is_not() -> None:
    found = gradient()
    clone, detached = found.clone(), found.detach()
    found.mul_(2)
    assert clone.window_values[0] == 1
    assert detached.window_values[0] == 2


def test_writing_outside_the_window_is_refused() -> None:
    with pytest.raises(InputError, match="cannot write into the gradient"):
        gradient().fill_(1.0)
    with pytest.raises(InputError, match="masters' gradients"):
        gradient().mul_(torch.ones(6, 5))

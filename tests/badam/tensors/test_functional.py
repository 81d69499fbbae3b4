"""Rounding, checking, clipping and updating of tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from badam.tensors import functional
from badam.tensors.functional import (
    adamw_,
    all_finite,
    clip_gradients_,
    copy_nearest_,
    gradient_norm,
    is_rounding_of,
    non_finite_flags,
    round_stochastically_,
)

NARROW = (torch.bfloat16, torch.float16)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rounded(source: Tensor, dtype: torch.dtype, seed: int = 0) -> Tensor:
    target = torch.empty(source.shape, dtype=dtype)
    round_stochastically_(target, source, generator(seed))
    return target


def neighbours(source: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers of ``dtype`` just below and above each entry; both the entry itself where it is one."""
    near = source.to(dtype)
    up = torch.nextafter(near, torch.full_like(near, torch.inf))
    down = torch.nextafter(near, torch.full_like(near, -torch.inf))
    wide = near.float()
    return torch.where(wide <= source, near, down), torch.where(wide >= source, near, up)


@pytest.mark.parametrize("dtype", NARROW)
@given(
    values=st.lists(st.floats(-60000, 60000, width=32, allow_subnormal=False), min_size=1, max_size=40),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_stochastic_rounding_gives_one_of_the_two_neighbours(
    values: list[float], seed: int, dtype: torch.dtype
) -> None:
    source = torch.tensor(values)
    result = rounded(source, dtype, seed)
    below, above = neighbours(source, dtype)
    assert bool(((result == below) | (result == above)).all())


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("value", [1.001, -0.37123, 3.3e-5, 1e-6, -5.1e-7, 800.3])
def test_stochastic_rounding_is_right_in_expectation(value: float, dtype: torch.dtype) -> None:
    source = torch.full((40_000,), value)
    result = rounded(source, dtype).double()
    spread = float(result.std()) / 200  # of the mean of 40 000
    assert abs(float(result.mean()) - float(source[0])) <= 5 * spread


@pytest.mark.parametrize("dtype", NARROW)
def test_stochastic_rounding_keeps_what_the_type_can_hold(dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, 1.0, -2.5, torch.inf, -torch.inf, torch.finfo(dtype).max, 2.0**-14])
    assert torch.equal(rounded(special, dtype).float(), special)
    assert bool(rounded(torch.tensor([torch.nan]), dtype).isnan().all())


def test_stochastic_rounding_is_a_function_of_its_generator() -> None:
    source = torch.randn(1000, generator=generator())
    assert torch.equal(rounded(source, torch.bfloat16, 1), rounded(source, torch.bfloat16, 1))
    assert not torch.equal(rounded(source, torch.bfloat16, 1), rounded(source, torch.bfloat16, 2))
    state = torch.get_rng_state()
    rounded(source, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("size", [1, 7, 8, 9, 31])
def test_stochastic_rounding_goes_piece_by_piece(
    size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "ROUNDING_CHUNK", 8)
    source = torch.randn(size, generator=generator(3))
    below, above = neighbours(source, dtype)
    result = rounded(source, dtype)
    assert bool(((result == below) | (result == above)).all())


def test_stochastic_rounding_draws_independently() -> None:
    result = rounded(torch.full((8000,), 1 + 2**-8), torch.bfloat16).float() > 1  # half way between 1 and 1 + 2**-7
    pairs = torch.stack([result[:-1], result[1:]]).int()
    assert abs(float(result.float().mean()) - 0.5) < 0.03
    assert abs(float((pairs[0] * pairs[1]).float().mean()) - 0.25) < 0.03


def test_a_transposed_target_is_rounded_in_place() -> None:
    target = torch.empty(5, 3, dtype=torch.bfloat16).t()
    source = torch.randn(3, 5, generator=generator())
    round_stochastically_(target, source, generator())
    assert torch.equal(target.contiguous(), rounded(source, torch.bfloat16))


@pytest.mark.parametrize("dtype", NARROW)
def test_nearest_is_the_conversion_of_torch(dtype: torch.dtype) -> None:
    source = [torch.randn(9, generator=generator()), torch.randn(2, 3, generator=generator(1))]
    target = [torch.empty(tensor.shape, dtype=dtype) for tensor in source]
    copy_nearest_(target, source)
    assert all(torch.equal(to, of.to(dtype)) for to, of in zip(target, source, strict=True))
    copy_nearest_([], [])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_bad_entry_among_many_is_found(bad: float, dtype: torch.dtype) -> None:
    tensors = [torch.randn(50).to(dtype), torch.randn(4, 4)]
    kept = [tensor.clone() for tensor in tensors]
    assert all_finite(tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))
    tensors[0][17] = bad
    assert not all_finite(tensors)
    assert sum(float(flag) for flag in non_finite_flags(tensors)) > 0
    assert all_finite([])


def test_what_has_no_data_counts_as_finite() -> None:
    with FakeTensorMode():
        assert all_finite([torch.empty(3)])


def test_the_norm_is_computed_in_fp32() -> None:
    gradient = torch.full((3000,), 1.01, dtype=torch.bfloat16)
    exact = gradient.double().norm()
    assert gradient_norm([gradient]).dtype == torch.float32
    assert float(gradient_norm([gradient[:1000], gradient[1000:]])) == pytest.approx(float(exact), rel=1e-6)


@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30),
    limit=st.floats(0.01, 50),
    order=st.sampled_from([1.0, 2.0, float("inf")]),
)
@settings(max_examples=60, deadline=None)
def test_clipping_is_that_of_torch(values: list[float], limit: float, order: float) -> None:
    ours = [torch.tensor(values), torch.tensor(values[::-1])]
    theirs = [torch.nn.Parameter(tensor.clone()) for tensor in ours]
    for parameter in theirs:
        parameter.grad = parameter.detach().clone()
    expected = torch.nn.utils.clip_grad_norm_(theirs, limit, order)
    assert float(clip_gradients_(ours, limit, order)) == pytest.approx(float(expected), rel=1e-5)
    for gradient, parameter in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_sparse_gradients_are_clipped_by_their_values() -> None:
    sparse = torch.sparse_coo_tensor([[0, 2, 2]], [3.0, 1.0, 3.0], (4,))
    assert float(clip_gradients_([sparse], 1.0)) == pytest.approx(5.0)
    assert float(sparse.to_dense().norm()) == pytest.approx(1.0, rel=1e-4)


def test_no_gradients_have_norm_zero() -> None:
    assert float(clip_gradients_([], 1.0)) == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_one_unit_in_the_last_place_off_its_master_is_still_its_rounding(dtype: torch.dtype) -> None:
    master = torch.tensor([1.0, -3.0, 0.0])
    unit = torch.finfo(dtype).eps
    assert is_rounding_of(master * (1 + 0.9 * unit), master, dtype)
    assert not is_rounding_of(master * (1 + 1.1 * unit), master, dtype)


def reference(lists: list[list[Tensor]], steps: int, **options: Any) -> list[Tensor]:
    masters = [torch.nn.Parameter(master.clone()) for master in lists[0]]
    optimizer = torch.optim.AdamW(masters, **options)
    for step in range(steps):
        for master, gradient in zip(masters, lists[1], strict=True):
            master.grad = gradient * (step + 1)
        optimizer.step()
    return [master.detach() for master in masters]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_adamw_is_torchs_bit_for_bit(kind: str, maximize: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    masters = [torch.randn(n, generator=generator) for n in (5, 300, 17)]
    gradients = [torch.randn(n, generator=generator) for n in (5, 300, 17)]
    options: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    expected = reference([masters, gradients], 4, **options, maximize=maximize, **{kind: True})
    first, second = ([torch.zeros_like(m) for m in masters] for _ in range(2))
    for step in range(4):
        scaled = [gradient * (step + 1) for gradient in gradients]
        kept = [gradient.clone() for gradient in scaled]
        adamw_(masters, scaled, first, second, step=step + 1, **options, maximize=maximize, fused=kind == "fused")
        assert all(torch.equal(a, b) for a, b in zip(scaled, kept, strict=True))
    for found, wanted in zip(masters, expected, strict=True):
        if kind == "fused":
            assert torch.equal(found, wanted)
        else:
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_a_flagged_fused_step_changes_nothing() -> None:
    master, first, second = torch.ones(3), torch.zeros(3), torch.zeros(3)
    gradient = torch.tensor([1.0, math.nan, math.inf])
    adamw_(
        [master], [gradient], [first], [second], step=1, lr=0.1, betas=(0.9, 0.99), eps=1e-8, found_inf=torch.ones(1)
    )
    assert torch.equal(master, torch.ones(3))
    assert not first.any()
    assert not second.any()

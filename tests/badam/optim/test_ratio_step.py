"""What one step and one visit of the ratio optimizer do, and what hosts may do to gradients in between."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from badam.optim.ratio import BlockOptimizerRatio
from badam.optim.window_gradient import WindowGradient
from tests.badam.optim.ratio_net import MODES, Net, build, moved, net, train, weights


@pytest.mark.parametrize("mask_mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_within_a_visit_it_is_adamw_on_fp32_windows_bit_for_bit(dtype: torch.dtype, mask_mode: str) -> None:
    model = net(dtype)
    groups = [
        {"params": [model.first.bias, model.second.bias], "weight_decay": 0.0, "lr": 3e-2, "eps": 1e-6},
        {"params": [model.first.weight, model.second.weight], "weight_decay": 0.1, "betas": (0.5, 0.9)},
    ]
    optimizer = BlockOptimizerRatio(
        groups, model.named_parameters(), 0.2, 0, 0, 10, None, mask_mode, 1e-2, write_back="nearest"
    )
    twin = copy.deepcopy(model)
    parameters = dict(twin.named_parameters())
    masters = {w.name: nn.Parameter(w.read(parameters[w.name].data)) for w in optimizer.windows}
    named = {id(w.parameter): w.name for w in optimizer.windows}
    reference = torch.optim.AdamW(
        [{**group, "params": [masters[named[id(p)]] for p in group["params"]]} for group in groups],
        lr=1e-2,
        betas=(0.9, 0.999),
        fused=True,
    )
    for step in range(5):
        twin.loss(step).backward()
        for window in optimizer.windows:
            parameter = parameters[window.name]
            masters[window.name].grad = window.read(parameter.grad)
            parameter.grad = None
        reference.step()
        with torch.no_grad():
            for window in optimizer.windows:
                window._place.write(parameters[window.name].view(-1), masters[window.name])
        train(model, optimizer, 1, step)
        for name, master in optimizer.masters.items():
            assert torch.equal(master, masters[name]), name
        for name, weight in model.named_parameters():
            assert torch.equal(weight, parameters[name]), name


@pytest.mark.parametrize("mask_mode", MODES)
def test_a_visit_moves_its_window_and_nothing_else(mask_mode: str) -> None:
    model = net(torch.float32)
    optimizer = build(model, mask_mode=mask_mode)
    before = weights(model)
    train(model, optimizer, 3)
    changed = moved(before, weights(model))
    assert {name: len(entries) for name, entries in changed.items()} == {w.name: w.size for w in optimizer.windows}
    assert len(changed["first.weight"]) == 58


@pytest.mark.parametrize("mask_mode", MODES)
def test_over_all_visits_every_entry_is_trained_equally_often(mask_mode: str) -> None:
    model = net(torch.float32)
    optimizer = build(model, mask_mode=mask_mode, update_ratio=1 / 12, switch_every=1, lr=1e-3)
    counts = {name: torch.zeros(p.numel()) for name, p in model.named_parameters()}
    for step in range(24):
        before = weights(model)
        train(model, optimizer, 1, step)
        for name, entries in moved(before, weights(model)).items():
            counts[name][entries] += 1
    for name, count in counts.items():
        assert torch.equal(count, torch.full_like(count, 2)), name


@pytest.mark.parametrize("every", [1, 2, 5])
def test_every_visit_has_the_same_number_of_steps_the_first_one_too(every: int) -> None:
    model = net()
    optimizer = build(model, switch_every=every)
    visits = []
    for step in range(3 * every):
        visits.append(optimizer.visit)
        train(model, optimizer, 1, step)
    assert visits == [visit for visit in range(3) for _ in range(every)]


@pytest.mark.parametrize("every", [0, -1])
def test_without_a_positive_number_of_steps_the_windows_stay(every: int) -> None:
    model = net()
    optimizer = build(model, switch_every=every)
    train(model, optimizer, 5)
    assert (optimizer.visit, optimizer.steps_in_visit, optimizer.global_step) == (0, 5, 5)


def test_micro_batches_do_not_move_the_window_and_accumulate_in_fp32() -> None:
    model = net()
    optimizer = build(model, switch_every=2, update_ratio=0.5)
    twin = copy.deepcopy(model)
    sums = {w.name: torch.zeros(w.size) for w in optimizer.windows}
    for seed in range(6):
        model.loss(seed).backward()
        twin.loss(seed).backward()
        for window, parameter in zip(optimizer.windows, twin.parameters(), strict=True):
            sums[window.name] += window.read(parameter.grad)
            parameter.grad = None
    assert optimizer.visit == 0
    for window in optimizer.windows:
        assert window.gradient is not None
        assert window.gradient.dtype == torch.float32
        assert torch.equal(window.gradient, sums[window.name])
        assert window.master.grad is window.gradient
    optimizer.step()
    assert (optimizer.visit, optimizer.steps_in_visit) == (0, 1)


def test_the_full_gradient_is_released_and_the_windows_with_the_step() -> None:
    model = net()
    optimizer = build(model)
    model.loss(0).backward()
    for parameter in model.parameters():
        assert isinstance(parameter.grad, WindowGradient)
        assert parameter.grad.untyped_storage().nbytes() == 0
    optimizer.step()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(master.grad is None for master in optimizer.masters.values())


def test_a_step_without_gradients_is_no_step() -> None:
    model = net()
    optimizer = build(model)
    before = weights(model)
    optimizer.step()
    assert optimizer.global_step == 0
    assert not any(moved(before, weights(model)).values())


def test_a_parameter_without_a_gradient_is_left_as_it_is() -> None:
    model = net()
    optimizer = build(model, weight_decay=0.5, switch_every=0)
    train(model, optimizer, 2)
    before = weights(model)
    model.first(torch.ones(1, 24, dtype=torch.bfloat16)).float().square().sum().backward()
    optimizer.step()
    changed = moved(before, weights(model))
    assert changed["first.weight"]
    assert not changed["second.weight"]
    assert optimizer.state[optimizer.masters["second.weight"]]["step"] == 2


def test_moments_start_afresh_at_every_visit() -> None:
    model = net()
    optimizer = build(model, switch_every=2)
    train(model, optimizer, 3)
    assert {entry["step"] for entry in optimizer.state.values()} == {1}
    optimizer.switch_windows()
    assert not optimizer.state


# --- clearing gradients ---------------------------------------------------------------------------------------------


def accumulated_twice(model: Net, optimizer: BlockOptimizerRatio, clear: Callable[[], None]) -> dict[str, Tensor]:
    model.loss(0).backward()
    clear()
    model.loss(1).backward()
    return {w.name: w.gradient for w in optimizer.windows if w.gradient is not None}


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("who", ["model", "optimizer"])
def test_the_host_may_clear_gradients_through_the_model_or_the_optimizer(who: str, set_to_none: bool) -> None:
    model = net()
    optimizer = build(model)
    cleared = {"model": model, "optimizer": optimizer}[who]
    found = accumulated_twice(model, optimizer, lambda: cleared.zero_grad(set_to_none=set_to_none))
    model.zero_grad()
    model.loss(1).backward()
    for window in optimizer.windows:
        assert window.gradient is not None
        assert torch.equal(found[window.name], window.gradient)
        assert window.master.grad is window.gradient


def test_gradients_cleared_through_the_model_do_not_stay_at_the_masters() -> None:
    model = net()
    optimizer = build(model)
    model.loss(0).backward()
    model.zero_grad()
    model.first(torch.ones(1, 24, dtype=torch.bfloat16)).float().square().sum().backward()
    assert optimizer.masters["second.weight"].grad is None
    assert optimizer.masters["first.weight"].grad is not None


# --- clipping and scaling -------------------------------------------------------------------------------------------


def clip_model(model: Net, optimizer: BlockOptimizerRatio) -> Tensor:
    return torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)


def clip_masters(model: Net, optimizer: BlockOptimizerRatio) -> Tensor:
    return torch.nn.utils.clip_grad_norm_(optimizer.masters.values(), 0.01)


def clip_method(model: Net, optimizer: BlockOptimizerRatio) -> Tensor:
    return optimizer.clip_grad_norm_(0.01)


@pytest.mark.parametrize("clip", [clip_model, clip_masters, clip_method])
def test_clipping_sees_the_windows_in_fp32(clip: Callable[[Net, BlockOptimizerRatio], Tensor]) -> None:
    model = net()
    optimizer = build(model)
    model.loss(0).backward()
    before = [w.gradient.double().clone() for w in optimizer.windows if w.gradient is not None]
    expected = torch.cat(before).norm()
    norm = clip(model, optimizer)
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
    after = torch.cat([w.gradient for w in optimizer.windows if w.gradient is not None])
    torch.testing.assert_close(after.double(), torch.cat(before) * (0.01 / expected), rtol=1e-4, atol=1e-9)


def test_grad_scaler_unscales_skips_and_recovers_in_fp16() -> None:
    model = net(torch.float16)
    optimizer = build(model, switch_every=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, growth_interval=1000)
    before = weights(model)
    scaler.scale(model.loss(0)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update(2.0**8)
    assert optimizer.global_step == 0
    assert not any(moved(before, weights(model)).values())
    model.zero_grad()
    scaler.scale(model.loss(1)).backward()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    twin = net(torch.float16)
    other = build(twin, switch_every=0)
    twin.loss(1).backward()
    torch.testing.assert_close(norm, other.clip_grad_norm_(1e9), rtol=1e-2, atol=0)
    scaler.step(optimizer)
    assert optimizer.global_step == 1
    assert optimizer.non_finite_steps == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_gradient_skips_the_step_and_is_counted(bad: float) -> None:
    model, twin, said = net(), net(), []
    optimizer = build(model, verbose=1, log_fn=said.append)
    other = build(twin)
    train(model, optimizer, 1)
    train(twin, other, 1)
    model.loss(1).backward()
    gradient = optimizer.windows[0].gradient
    assert gradient is not None
    gradient[0] = bad
    optimizer.step()
    assert (optimizer.non_finite_steps, optimizer.global_step, optimizer.steps_in_visit) == (1, 1, 1)
    assert "skipped" in said[-1]
    assert "1 such steps" in said[-1]
    train(model, optimizer, 1, 2)
    train(twin, other, 1, 2)
    assert not any(moved(weights(twin), weights(model)).values())

"""The ratio optimizer with other rules and with gradient release, and what it is to code around it."""

from __future__ import annotations

import functools
import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from badam import phases
from badam.errors import InputError
from badam.vocabulary import Phase
from tests.badam.optim.ratio_net import Net, build, moved, net, train, weights


def test_another_base_optimizer_runs_on_the_masters() -> None:
    model = net(torch.float32)
    optimizer = build(
        model, base_optimizer=functools.partial(torch.optim.SGD, momentum=0.9), lr=0.1, switch_every=2, verbose=0
    )
    twin = net(torch.float32)
    train(model, optimizer, 2)
    masters = [nn.Parameter(w.read(p.data)) for w, p in zip(build(net()).windows, twin.parameters(), strict=True)]
    reference = torch.optim.SGD(masters, lr=0.1, momentum=0.9)
    places = build(net()).windows
    for step in range(2):
        twin.loss(step).backward()
        for window, master, parameter in zip(places, masters, twin.parameters(), strict=True):
            master.grad = window.read(parameter.grad)
            parameter.grad = None
        reference.step()
        with torch.no_grad():
            for window, master, parameter in zip(places, masters, twin.parameters(), strict=True):
                window._place.write(parameter.view(-1), master)
    assert not any(moved(weights(twin), weights(model)).values())
    assert optimizer.visit == 1
    assert not optimizer.state
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups


@pytest.mark.parametrize("fused", [True, False])
def test_learning_rate_schedulers_act(fused: bool) -> None:
    model = net()
    optimizer = build(model, fused=fused)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    train(model, optimizer, 1)
    scheduler.step()
    before = weights(model)
    train(model, optimizer, 1)
    assert not any(moved(before, weights(model)).values())


# --- gradient release -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"fused": False}, {"mask_mode": "scatter"}, {"base_optimizer": torch.optim.SGD}]
)
def test_gradient_release_gives_the_same_weights_and_keeps_no_gradient(options: dict[str, Any]) -> None:
    model, twin = net(), net()
    released, ordinary = build(model, gradient_release=True, **options), build(twin, **options)
    for step in range(7):
        model.loss(step).backward()
        assert all(p.grad is None for p in model.parameters())
        assert all(m.grad is None for m in released.masters.values())
        released.step()
        train(twin, ordinary, 1, step)
    assert not any(moved(weights(twin), weights(model)).values())
    assert released.visit == ordinary.visit == 2


@pytest.mark.parametrize("options", [{}, {"fused": False}])
def test_gradient_release_skips_a_parameter_with_a_non_finite_gradient(options: dict[str, Any]) -> None:
    model, twin = net(torch.float32), net(torch.float32)
    released, ordinary = build(model, gradient_release=True, **options), build(twin, **options)
    before = weights(model)
    model.second.weight.register_hook(lambda gradient: gradient * math.nan)
    model.loss(0).backward()
    released.step()
    changed = moved(before, weights(model))
    assert not changed["second.weight"]
    assert changed["first.weight"]
    assert (released.non_finite_steps, released.global_step) == (1, 1)
    model.second.weight._backward_hooks.clear()
    twin.loss(0).backward()
    twin.second.weight.grad = None
    ordinary.step()
    train(model, released, 1, 1)
    train(twin, ordinary, 1, 1)
    assert not any(moved(weights(twin), weights(model)).values())


def test_gradient_release_refuses_to_clip_or_accumulate() -> None:
    model = net()
    optimizer = build(model, gradient_release=True)
    with pytest.raises(InputError, match="before the norm of all gradients is known"):
        optimizer.clip_grad_norm_(1.0)
    model.loss(0).backward()
    with pytest.raises(InputError, match="cannot accumulate"):
        model.loss(1).backward()
    optimizer.zero_grad()
    model.loss(1).backward()
    optimizer.step()
    assert optimizer.global_step == 1


# --- the surroundings -----------------------------------------------------------------------------------------------


def test_phases_are_announced() -> None:
    model = net()
    optimizer = build(model, switch_every=1)
    seen: list[Phase] = []
    with phases.within(Phase.BACKWARD):
        model.loss(0).backward()
        with phases.listening(lambda _, phase: seen.append(phase)):
            optimizer.step()
    assert seen == [Phase.STEP, Phase.BACKWARD, Phase.SWITCH, Phase.BACKWARD]


@pytest.mark.parametrize(
    "options",
    [{}, {"mask_mode": "scatter"}, {"mask_mode": "scatter", "keep_mask": False}, {"gradient_release": True}],
)
def test_runs_on_fake_tensors(options: dict[str, Any]) -> None:
    with FakeTensorMode():
        model = Net(64, torch.bfloat16)
        optimizer = build(model, switch_every=2, **options)
        for _ in range(5):
            for _ in range(1 if "gradient_release" in options else 2):
                model.second(model.first(torch.zeros(2, 64, dtype=torch.bfloat16))).float().sum().backward()
            if "gradient_release" not in options:
                optimizer.clip_grad_norm_(1.0)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        assert (optimizer.global_step, optimizer.visit) == (5, 2)


def test_code_for_the_block_optimizer_finds_what_it_looks_for() -> None:
    model = net()
    optimizer = build(model, switch_every=2)
    assert (optimizer.block_num, optimizer.current_block_idx) == (1, 0)
    assert list(optimizer.param_idx2lp.values()) == list(model.parameters())
    assert optimizer.param_idx2hp == {}
    visits: list[int] = []
    remove = optimizer.register_switch_hook(lambda switched: visits.append(switched.visit))
    train(model, optimizer, 4)
    assert visits == [0, 1, 2]
    assert list(optimizer.param_idx2hp.values()) == list(optimizer.masters.values())
    remove()
    train(model, optimizer, 2)
    assert visits == [0, 1, 2]


def test_a_later_optimizer_takes_over_and_the_earlier_one_can_go() -> None:
    model = net()
    first = build(model)
    train(model, first, 1)
    second = build(model)
    model.loss(1).backward()
    assert all(master.grad is None for master in first.masters.values())
    second.step()
    train(model, second, 1)
    assert (first.global_step, second.global_step) == (1, 2)
    gone = weakref.ref(second)
    del second
    gc.collect()
    assert gone() is None
    model.loss(0).backward()
    assert type(model.first.weight.grad) is Tensor


def test_it_says_what_it_does_and_nothing_when_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    train(model := net(), build(model, verbose=0), 3)
    assert capsys.readouterr().out == ""
    train(model := net(), build(model, verbose=2), 3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Training 120 of 1200 entries at a time (adjacent) in 4 parameters")
    assert "first.weight: 58 of 576" in lines[1]
    assert "after 3 steps" in lines[-1]

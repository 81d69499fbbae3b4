"""Parameter groups stay the user's: their options and schedules hold, and visits leave nothing behind in them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from badam.errors import InputError
from tests.badam.optim.tiny_net import LR, CountingSGD, adamw, blocks, loss_of, net


def test_hyperparameters_of_every_group_hold_for_its_parameters() -> None:
    model = net(torch.float32)
    norms = [parameter for name, parameter in model.named_parameters() if "norm" in name or "bias" in name]
    rest = [parameter for name, parameter in model.named_parameters() if not ("norm" in name or "bias" in name)]
    base = adamw([{"params": norms, "weight_decay": 0.0, "lr": 0.0}, {"params": rest, "weight_decay": 0.5}])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = blocks(model, base, switch_block_every=0)
    for parameter in optimizer.param_idx2lp.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.layers[0].named_parameters():
        exempt = "norm" in name or "bias" in name
        expected = before[f"layers.0.{name}"] * (1 if exempt else 1 - LR * 0.5)
        torch.testing.assert_close(parameter, expected)


def test_schedulers_on_either_object_act_on_all_groups() -> None:
    model = net()
    base = adamw([{"params": list(model.parameters())[:7]}, {"params": list(model.parameters())[7:], "lr": 0.1}])
    optimizer = blocks(model, base, switch_block_every=1)
    schedulers = [torch.optim.lr_scheduler.StepLR(each, 1, gamma=0.5) for each in (optimizer, base)]
    for step in range(2):
        loss_of(model, step).backward()
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([LR / 16, 0.1 / 16])
    assert optimizer.param_groups is base.param_groups
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_the_current_learning_rate_is_the_one_that_is_used() -> None:
    model = net(torch.float32)
    optimizer = blocks(model, torch.optim.SGD(model.parameters(), lr=1.0), switch_block_every=0)
    weight = model.layers[0].linear.weight
    for rate in (0.5, 0.125):
        optimizer.param_groups[0]["lr"] = rate
        before = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        torch.testing.assert_close(before - weight, torch.full_like(weight, rate))


def test_base_optimizers_that_keep_counters_in_their_groups_start_afresh_too() -> None:
    model = net(torch.float32)
    optimizer = blocks(model, CountingSGD(model.parameters(), lr=1.0), switch_block_every=2)
    counts = []
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        optimizer.step()
        counts.append(optimizer.param_groups[0].get("count"))
    assert counts == [1, None, 1, None, 1]


def test_parameters_cannot_come_later() -> None:
    model = net()
    optimizer = blocks(model)
    with pytest.raises(InputError, match="cannot be added"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})

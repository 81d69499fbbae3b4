"""Masters and the model's weights: when masters are made, how they are rounded, and weights that were loaded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from badam.optim.active_parameter import HAS_GRAD_DTYPE
from tests.badam.optim.tiny_net import WIDTH, blocks, loss_of, net


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    return parameter.grad_dtype if HAS_GRAD_DTYPE else parameter.dtype


def movement(write_back: str) -> float:
    """How much of 50 fp32 steps of a learning rate of 1e-6 is in the bf16 weights after the switch, relative."""
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(128, 128, bias=False) for _ in range(2))
    model.bfloat16()
    weight = model.layers[0].weight
    before, wide = weight.detach().float(), nn.Parameter(weight.detach().float())
    signs = torch.randn(weight.shape).sign()
    reference = torch.optim.AdamW([wide], lr=1e-6, weight_decay=0.0)
    base = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    optimizer = blocks(model, base, switch_block_every=50, write_back=write_back)
    for _ in range(50):
        weight.grad = signs.to(gradient_dtype(weight))
        wide.grad = signs.clone()
        optimizer.step()
        reference.step()
    assert optimizer.current_block_idx == 1
    along = (weight.detach().float() - before) * -signs
    return float(along.sum() / ((wide.detach() - before) * -signs).sum())


def test_movement_at_a_small_learning_rate_survives_stochastic_write_back_and_not_nearest() -> None:
    assert movement("stochastic") == pytest.approx(1.0, abs=0.1)
    assert movement("nearest") < 0.5


def test_masters_are_made_at_the_first_step_so_that_weights_may_be_loaded_before_it() -> None:
    model, other = net(), net()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    optimizer = blocks(model, switch_block_every=0)
    assert not optimizer.masters
    model.load_state_dict(other.state_dict())
    reference = blocks(other, switch_block_every=0)
    for each, stepper in ((model, optimizer), (other, reference)):
        loss_of(each, 0).backward()
        stepper.step()
    assert all(torch.equal(p, other.get_parameter(name)) for name, p in model.named_parameters())


def test_weights_loaded_during_a_visit_are_taken_over() -> None:
    model = net()
    optimizer = blocks(model, torch.optim.SGD(model.parameters(), lr=0.0), switch_block_every=0)
    loss_of(model, 0).backward()
    optimizer.step()
    loaded = {name: torch.full_like(tensor, 0.5) for name, tensor in model.state_dict().items()}
    model.load_state_dict(loaded)
    optimizer.write_back_block()
    assert bool((model.layers[0].linear.weight == 0.5).all())
    loss_of(model, 1).backward()
    optimizer.step()
    assert bool((model.layers[0].linear.weight == 0.5).all())


def test_the_final_write_back_keeps_the_masters() -> None:
    model, twin = net(), net()
    optimizers = [blocks(each, switch_block_every=0) for each in (model, twin)]
    for step in range(4):
        if step == 2:
            optimizers[0].write_back_block()
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            # Gradients that do not depend on the weights, which differ in rounding at step 2.
            weight = each.layers[0].linear.weight
            weight.grad = torch.full((WIDTH, WIDTH), step - 1.5, dtype=gradient_dtype(weight))
            optimizer.step()
    assert torch.equal(model.layers[0].linear.weight, twin.layers[0].linear.weight)
    assert torch.equal(*(optimizer.masters["layers.0.linear.weight"] for optimizer in optimizers))


def test_a_block_is_rounded_differently_at_every_visit() -> None:
    model = net()
    optimizer = blocks(model, block_prefix_list=["layers.0"], switch_block_every=0)
    results = []
    for _ in range(2):
        for member in optimizer.active_parameters:
            member.load_master(torch.full(member.weight.shape, 1 + 2**-8))  # half way between two bf16 numbers
        optimizer.switch_trainable_params()
        results.append(model.layers[0].linear.weight.detach().clone())
    assert {1.0, 1 + 2**-7} == set(results[0].float().flatten().tolist())
    assert not torch.equal(*results)

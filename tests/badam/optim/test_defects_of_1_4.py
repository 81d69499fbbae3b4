"""What badam 1.4's BlockOptimizer gets wrong, one test each, so that it does not come back."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from badam import BlockOptimizer
from tests.badam.optim.tiny_net import LR, adamw, blocks, loss_of, net


def steps(model: nn.Module, optimizer: BlockOptimizer, count: int) -> list[int]:
    """Train ``count`` steps; the active block of each."""
    active = []
    for step in range(count):
        active.append(optimizer.current_block_idx)
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return active


def test_resuming_returns_to_the_saved_block_with_its_moments() -> None:
    model, other = net(), net()
    optimizer, resumed = blocks(model, switch_block_every=3), blocks(other, switch_block_every=3)
    steps(model, optimizer, 5)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.current_block_idx == 1
    moments = {name: optimizer.state[master]["exp_avg"] for name, master in optimizer.masters.items()}
    assert moments
    assert all(name.startswith("layers.1.") for name in moments)
    for name, master in resumed.masters.items():
        assert torch.equal(resumed.state[master]["exp_avg"], moments[name])


def test_weight_decay_is_the_users_and_norms_are_not_decayed() -> None:
    model = net(torch.float32)
    norms = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    rest = [parameter for name, parameter in model.named_parameters() if "norm" not in name]
    # The group without decay comes first, where 1.4 read the decay of all.
    base = adamw([{"params": norms, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.3}])
    optimizer = blocks(model, base)
    layer = model.layers[0]
    before = layer.norm.weight.detach().clone(), layer.linear.weight.detach().clone()
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(layer.norm.weight, before[0])
    torch.testing.assert_close(layer.linear.weight, before[1] * (1 - LR * 0.3))


def test_every_group_keeps_its_learning_rate_and_betas() -> None:
    model = net()
    parameters = list(model.parameters())
    base = adamw([{"params": parameters[:5], "lr": 0.1, "betas": (0.5, 0.6)}, {"params": parameters[5:], "lr": 0.2}])
    optimizer = blocks(model, base, switch_block_every=1)
    steps(model, optimizer, 3)
    kept = [(group["lr"], group["betas"]) for group in optimizer.param_groups]
    assert kept == [(0.1, (0.5, 0.6)), (0.2, (0.9, 0.999))]


def test_the_first_visit_has_k_steps() -> None:
    model = net()
    assert steps(model, blocks(model, switch_block_every=3), 8) == [0, 0, 0, 1, 1, 1, 2, 2]


def test_k_of_minus_one_never_switches() -> None:
    model = net()
    assert steps(model, blocks(model, switch_block_every=-1), 6) == [0] * 6


def test_fixed_works_without_a_start_block() -> None:
    model = net()
    assert set(steps(model, blocks(model, switch_mode="fixed", switch_block_every=1), 4)) == {0}


def test_random_works_with_a_start_block() -> None:
    model = net()
    visited = steps(model, blocks(model, switch_mode="random", start_block=2, switch_block_every=1), 6)
    assert visited[0] == 2
    assert sorted(visited[:3]) == sorted(visited[3:]) == [0, 1, 2]


def test_layer_1_does_not_train_layers_10_and_11() -> None:
    model = net(layers=12)
    optimizer = blocks(model, block_prefix_list=[["layers.1"], ["layers.10"]])
    assert all(member.name.startswith("layers.1.") for member in optimizer.active_parameters)


def test_the_head_block_does_not_swallow_the_embedding() -> None:
    model = net()
    head = blocks(model, include_lm_head=True).blocks[-1]
    assert head.prefixes == ("head",)


def test_an_unused_parameter_does_not_kill_the_run() -> None:
    model = net()
    optimizer = blocks(model)
    loss_of(model, 0, routed=False).backward()
    optimizer.step()
    assert optimizer.global_step == 1


def test_a_parameter_that_the_user_froze_is_not_unfrozen() -> None:
    model = net()
    model.layers[0].linear.bias.requires_grad_(False)
    optimizer = blocks(model, switch_block_every=1)
    steps(model, optimizer, 4)
    assert not model.layers[0].linear.bias.requires_grad


def test_verbose_is_heeded_and_the_order_is_in_the_message(capsys: pytest.CaptureFixture[str]) -> None:
    blocks(net(), verbose=0, switch_mode="random").switch_trainable_params()
    assert capsys.readouterr().out == ""
    said: list[str] = []
    optimizer = blocks(net(), verbose=1, log_fn=said.append, switch_mode="random", switch_block_every=1)
    for _ in range(3):
        optimizer.step()
    announced = [text for text in said if "order" in text]
    assert len(announced) == 2
    for epoch, text in enumerate(announced):
        assert text.endswith(", ".join(str(index + 1) for index in optimizer.schedule.order(epoch)) + ".")


def test_neither_the_step_nor_the_switch_empties_caches_or_collects_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        pytest.fail("a step or a switch must not do this")

    monkeypatch.setattr(gc, "collect", refuse)
    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
    model = net()
    steps(model, blocks(model, switch_block_every=2), 5)


def test_a_name_that_contains_lora_is_a_name_like_any_other() -> None:
    class Explorable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.ModuleDict({"explora": nn.Linear(2, 2), "up": nn.Linear(2, 2)}) for _ in range(2)
            )

    optimizer = blocks(Explorable())
    assert {member.name for member in optimizer.active_parameters} == {
        f"layers.0.{child}.{kind}" for child in ("explora", "up") for kind in ("weight", "bias")
    }


def test_adapters_train_alone_because_everything_else_is_frozen() -> None:
    from peft import LoraConfig, get_peft_model

    from tests.badam.optim.tiny_net import Net

    adapted = get_peft_model(Net(), LoraConfig(r=2, target_modules=["linear"]))
    optimizer = blocks(adapted, switch_block_every=1)
    for _ in range(3):
        assert len(optimizer.active_parameters) == 2
        assert all("lora_" in member.name for member in optimizer.active_parameters)
        optimizer.step()


def test_the_loss_of_a_closure_is_returned() -> None:
    model = net()

    def closure() -> Tensor:
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    assert torch.is_tensor(blocks(model).step(closure))


def test_a_generator_of_named_parameters_trains() -> None:
    model = net()
    before = model.layers[0].linear.weight.detach().clone()
    optimizer = BlockOptimizer(adamw(model.parameters()), model.named_parameters(), switch_mode="ascending", verbose=0)
    steps(model, optimizer, 1)
    assert not torch.equal(model.layers[0].linear.weight, before)


def test_weights_loaded_after_construction_are_not_overwritten() -> None:
    model, other = net(), net(layers=3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    optimizer = blocks(model, torch.optim.SGD(model.parameters(), lr=0.0))
    model.load_state_dict(other.state_dict())
    steps(model, optimizer, 1)
    assert all(torch.equal(p, other.get_parameter(name)) for name, p in model.named_parameters())


def test_importing_it_loads_no_transformers() -> None:
    import subprocess
    import sys

    code = "from badam import BlockOptimizer; import sys; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

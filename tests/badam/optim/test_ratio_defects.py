"""What badam 1.4's ratio optimizer gets wrong, one test each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from badam.errors import InputError
from badam.optim.ratio import BlockOptimizerRatio

ModelFactory = Callable[..., nn.Module]


def layer(size: int = 64, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(size, size, bias=False).to(dtype)


def build(model: nn.Module, **options: Any) -> BlockOptimizerRatio:
    settings: dict[str, Any] = {"update_ratio": 0.25, "switch_every": 10, "lr": 1e-3, "verbose": 0}
    return BlockOptimizerRatio(list(model.parameters()), model.named_parameters(), **{**settings, **options})


def llama_step(model: nn.Module, optimizer: BlockOptimizerRatio, tokens: Tensor) -> None:
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()


def test_tied_embeddings_do_not_crash(tiny_llama: ModelFactory, token_batch: Callable[[], Tensor]) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    optimizer = build(model)
    llama_step(model, optimizer, token_batch())
    assert optimizer.global_step == 1


def test_a_model_without_embedding_or_head_does_not_crash() -> None:
    model = layer()
    optimizer = build(model)
    model(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert optimizer.global_step == 1


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"weight_decay": 0.1}, {"fused": False}])
def test_options_of_torchs_adamw_are_accepted(options: dict[str, Any]) -> None:
    model = layer()
    optimizer = build(model, **options)
    model(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert optimizer.global_step == 1


def test_moments_are_fp32_and_do_not_stall() -> None:
    model = layer()
    optimizer = build(model, switch_every=0, lr=0.0)
    for _ in range(3000):
        model.weight.grad = None
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.take_gradient(optimizer.windows[0])
        optimizer.step()
    (state,) = optimizer.state.values()
    assert state["exp_avg_sq"].dtype == torch.float32
    assert state["exp_avg_sq"].min() == pytest.approx(1 - 0.999**3000, rel=1e-4)


def test_at_a_small_learning_rate_all_masters_and_a_fair_share_of_weights_move() -> None:
    model = layer()
    nn.init.constant_(model.weight, 0.02)
    optimizer = build(model, lr=1e-6, switch_every=20)
    for _ in range(19):
        model.weight.float().sum().backward()
        optimizer.step()
    (master,) = optimizer.masters.values()
    torch.testing.assert_close(master.detach(), torch.full_like(master, model.weight[-1, -1].item() - 19e-6))
    model.weight.float().sum().backward()
    optimizer.step()
    assert optimizer.visit == 1
    unit = 0.02 * 2**-8
    share = float((model.weight.flatten()[:1024] != model.weight[-1, -1]).float().mean())
    assert share == pytest.approx(20e-6 / unit, rel=0.7)
    assert share > 0.1


def test_the_window_does_not_jump_at_every_micro_batch() -> None:
    model = layer(dtype=torch.float32)
    optimizer = build(model, switch_every=2)
    before = model.weight.detach().clone()
    for _ in range(2):
        for _ in range(5):
            model.weight.sum().backward()
        optimizer.step()
    assert (before != model.weight).flatten().nonzero().flatten().tolist() == list(range(1024))


def test_scattered_windows_of_one_visit_stay_one_and_the_global_generator_is_left_alone() -> None:
    model = layer(dtype=torch.float32)
    before = model.weight.detach().clone()
    state = torch.get_rng_state()
    optimizer = build(model, mask_mode="scatter", switch_every=3)
    for _ in range(3):
        model.weight.sum().backward()
        optimizer.step()
    assert int((before != model.weight).sum()) == 1024
    assert torch.equal(torch.get_rng_state(), state)


def test_parameters_of_one_shape_do_not_share_their_entries() -> None:
    model = nn.ModuleDict({"a": layer(dtype=torch.float32), "b": layer(dtype=torch.float32)})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build(model, mask_mode="scatter")
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    trained = {name: (before[name] != p).flatten() for name, p in model.named_parameters()}
    assert not torch.equal(trained["a.weight"], trained["b.weight"])


def bytes_of(tensors: list[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({}, 16),
        ({"mask_mode": "scatter"}, 16.25),
        ({"mask_mode": "scatter", "scatter_run": 1}, 20),
        ({"mask_mode": "scatter", "keep_mask": False}, 16),
    ],
)
def test_master_moments_gradient_and_mask_take_few_bytes(options: dict[str, Any], limit: float) -> None:
    model = layer(256)
    optimizer = build(model, **options)
    for step in range(2):
        model.weight.float().sum().backward()
        if step == 0:
            optimizer.step()
    (window,) = optimizer.windows
    (state,) = optimizer.state.values()
    assert window.gradient is not None
    index = getattr(window._place, "_kept", None) or []
    held = [window.master.detach(), window.gradient, state["exp_avg"], state["exp_avg_sq"], *index]
    assert bytes_of(held) / window.size == limit


def test_weight_decay_and_options_of_each_group_hold() -> None:
    model = nn.ModuleDict({"a": layer(dtype=torch.float32), "b": layer(dtype=torch.float32)})
    groups = [
        {"params": [model["a"].weight], "weight_decay": 0.5, "lr": 1e-2},
        {"params": [model["b"].weight], "weight_decay": 0.0, "lr": 1e-3},
    ]
    optimizer = BlockOptimizerRatio(groups, model.named_parameters(), 1.0, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sum((p * 0).sum() for p in model.parameters()).backward()
    optimizer.step()
    torch.testing.assert_close(model["a"].weight, before["a.weight"] * (1 - 0.5e-2))
    assert torch.equal(model["b"].weight, before["b.weight"])


def test_a_generator_of_named_parameters_works_and_an_empty_one_is_refused() -> None:
    model = layer()
    names = model.named_parameters()
    assert build(model).windows[0].name == "weight"
    optimizer = BlockOptimizerRatio(model.parameters(), names, verbose=0)
    assert optimizer.windows[0].name == "weight"
    with pytest.raises(InputError, match="named_parameters_list holds no parameters"):
        BlockOptimizerRatio(model.parameters(), names)
    with pytest.raises(InputError, match="param_groups holds no parameters"):
        BlockOptimizerRatio(iter(()), model.named_parameters())


def test_the_closures_loss_is_returned_and_called_once() -> None:
    model = layer()
    optimizer = build(model)
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = model.weight.float().square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss > 0
    assert calls == [1]
    assert optimizer.global_step == 1


def test_the_devices_cache_is_not_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: pytest.fail("emptied"))
    model = layer()
    optimizer = build(model, switch_every=1)
    model.weight.float().sum().backward()
    optimizer.step()


def test_a_frozen_parameter_is_not_unfrozen_and_unrouted_ones_are_no_error(tiny_llama: ModelFactory) -> None:
    model = tiny_llama()
    frozen = model.get_parameter("model.layers.1.mlp.up_proj.weight").requires_grad_(False)
    optimizer = build(model)
    model.get_parameter("model.norm.weight").float().sum().backward()
    optimizer.step()
    assert not frozen.requires_grad
    assert optimizer.global_step == 1


def test_ratios_by_name_match_on_module_boundaries(tiny_llama: ModelFactory) -> None:
    model = tiny_llama(num_hidden_layers=11, hidden_size=16, intermediate_size=16)
    optimizer = build(model, param_update_ratios={"layers.1": 1.0, "q_proj": 0.5}, preserve_threshold=0)
    shares = {window.name: window.size / window.numel for window in optimizer.windows}
    assert shares["model.layers.1.mlp.up_proj.weight"] == 1.0
    assert shares["model.layers.10.mlp.up_proj.weight"] == 0.25
    assert shares["model.layers.10.self_attn.q_proj.weight"] == 0.5


def test_positional_arguments_are_those_of_1_4() -> None:
    model = layer()
    optimizer = BlockOptimizerRatio(
        [{"params": [model.weight]}],
        [("weight", model.weight)],
        0.5,
        0,
        7,
        50,
        {"weight": 0.25},
        "scatter",
        2e-3,
        (0.5, 0.6),
        1e-4,
        {"lr": 3e-3},
        False,
        True,
        True,
    )
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["eps"]) == (3e-3, (0.5, 0.6), 1e-4)
    assert (optimizer.update_ratio, optimizer.verbose, optimizer.switch_every) == (0.5, 0, 7)
    assert (optimizer.preserve_threshold, optimizer.mask_mode, optimizer.keep_mask) == (50, "scatter", False)
    assert optimizer.windows[0].size == 1024

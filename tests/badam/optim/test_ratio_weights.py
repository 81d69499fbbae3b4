"""Which of the model's weights the ratio optimizer trains, and what happens when others write to them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from badam.errors import InputError
from badam.optim.ratio import BlockOptimizerRatio
from tests.badam.optim.ratio_net import MODES, Net, build, moved, net, train, weights


@pytest.mark.parametrize("mask_mode", MODES)
def test_stochastic_write_back_keeps_movement_that_nearest_loses(mask_mode: str) -> None:
    def retained(write_back: str) -> float:
        torch.manual_seed(0)
        model = nn.Linear(128, 128, bias=False).to(torch.bfloat16)
        nn.init.uniform_(model.weight, 0.02, 0.06)
        options = {"mask_mode": mask_mode, "lr": 1e-6, "switch_every": 50, "update_ratio": 0.5}
        optimizer = build(model, write_back=write_back, **options)
        start = model.weight.detach().float()
        for _ in range(50):
            model.weight.float().sum().backward()
            masters = optimizer.masters["weight"].detach().clone()
            optimizer.step()
        intended = 50 * 1e-6 * masters.numel()
        return float((start - model.weight.detach().float()).sum()) / intended

    assert retained("stochastic") == pytest.approx(1.0, abs=0.05)
    assert retained("nearest") < 0.6


def test_masters_are_read_at_the_first_gradient_not_before() -> None:
    model, source = net(), Net(24).to(torch.bfloat16)
    optimizer = build(model)
    model.load_state_dict(source.state_dict())
    train(model, optimizer, 3)
    other = build(source)
    train(source, other, 3)
    assert not any(moved(weights(source), weights(model)).values())


def test_weights_loaded_within_a_visit_are_not_overwritten() -> None:
    model = net()
    optimizer = build(model, switch_every=0)
    train(model, optimizer, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    before = weights(model)
    train(model, optimizer, 1)
    for name, weight in weights(model).items():
        assert (weight - before[name]).abs().max() < 0.1


def test_weights_loaded_since_the_last_step_stay_as_they_are_though_a_backward_has_seen_them() -> None:
    model = net()
    optimizer = build(model, switch_every=0)
    train(model, optimizer, 2)
    model.load_state_dict(copy.deepcopy(model.state_dict()))  # the masters, rounded: within one unit of the last place
    before = weights(model)
    model.loss(0).backward()
    optimizer.write_back_block()
    assert not any(moved(before, weights(model)).values())


def test_weights_whose_memory_was_replaced_are_still_trained() -> None:
    model, twin = net(), net()
    optimizer, other = build(model), build(twin)
    for step in range(2):
        train(model, optimizer, 1, step)
        train(twin, other, 1, step)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    train(model, optimizer, 1, 2)
    train(twin, other, 1, 2)
    assert not any(moved(weights(twin), weights(model)).values())


def test_a_visit_that_is_resumed_keeps_masters_behind_rounded_weights() -> None:
    model = net()
    optimizer = build(model, switch_every=0)
    train(model, optimizer, 2)
    masters = {name: master.detach().clone() for name, master in optimizer.masters.items()}
    model.load_state_dict(copy.deepcopy(model.state_dict()))  # as a checkpoint does: the same numbers, written again
    model.loss(0).backward()
    for name, master in optimizer.masters.items():
        assert torch.equal(master, masters[name])


def test_a_transposed_parameter_is_trained_in_its_memory_order() -> None:
    model = net(torch.float32)
    model.first.weight = nn.Parameter(model.first.weight.detach().t())
    assert not model.first.weight.is_contiguous()
    optimizer = build(model)
    before = weights(model)
    train(model, optimizer, 1)
    memory = (before["first.weight"] != model.first.weight).t().flatten().nonzero().flatten().tolist()
    assert memory == list(range(58))


# --- which parameters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_are_trained_only_if_asked_for(
    tiny_llama: Callable[..., nn.Module], embedding: bool, head: bool, tied: bool
) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    optimizer = build(model, include_embedding=embedding, include_lm_head=head)
    names = {window.name for window in optimizer.windows}
    assert ("model.embed_tokens.weight" in names) == (embedding or (tied and head))
    assert ("lm_head.weight" in names) == (head and not tied)
    assert model.get_input_embeddings().weight.requires_grad == ("model.embed_tokens.weight" in names)
    assert {"model.norm.weight", "model.layers.0.mlp.up_proj.weight"} <= names


def test_parameters_in_no_group_and_frozen_ones_are_not_trained() -> None:
    model = net(torch.float32)
    model.first.weight.requires_grad_(False)
    optimizer = BlockOptimizerRatio([model.first.weight, model.second.weight], model.named_parameters(), verbose=0)
    before = weights(model)
    train(model, optimizer, 1)
    assert {name for name, entries in moved(before, weights(model)).items() if entries} == {"second.weight"}
    assert not model.first.weight.requires_grad


def test_small_parameters_are_trained_whole_and_special_ratios_hold() -> None:
    model = net()
    optimizer = build(model, preserve_threshold=25, param_update_ratios={"second": 0.5, "second.weight": 0.25})
    assert {w.name: w.size for w in optimizer.windows} == {
        "first.weight": 58,
        "first.bias": 24,
        "second.weight": 144,
        "second.bias": 24,
    }


def test_parameters_may_be_added_later() -> None:
    model = net()
    rest = [model.second.weight]
    optimizer = BlockOptimizerRatio([model.first.weight], model.named_parameters(), switch_every=2, verbose=0)
    train(model, optimizer, 3)
    optimizer.add_param_group({"params": rest, "lr": 0.5})
    before = weights(model)
    train(model, optimizer, 1)
    changed = moved(before, weights(model))["second.weight"]
    assert changed[0] == 58  # the second visit's place
    assert [group["lr"] for group in optimizer.param_groups] == [1e-5, 0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update_ratio": 0.0}, "update_ratio is 0.0"),
        ({"update_ratio": 1.5}, "update_ratio is 1.5"),
        ({"param_update_ratios": {"frist": 0.5}}, "names 'frist'.*Near matches: first"),
        ({"param_update_ratios": {"first": 2.0}}, r"param_update_ratios\['first'\] is 2.0"),
        ({"mask_mode": "random"}, "Unknown mask_mode 'random'.*adjacent or scatter"),
        ({"write_back": "up"}, "Unknown write_back"),
        ({"fused": True, "foreach": True}, "exclude each other"),
        ({"scatter_run": 3}, "not a power of two"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(net(), **options)


def test_nothing_to_train_twice_or_in_pieces_is_refused() -> None:
    model = net()
    with pytest.raises(InputError, match=r"first\.weight is in param_groups twice"):
        BlockOptimizerRatio([model.first.weight] * 2, model.named_parameters())
    model.first.weight = nn.Parameter(torch.zeros(1).expand(24, 24))
    with pytest.raises(InputError, match="ordinary dense tensor"):
        build(model)
    with pytest.raises(InputError, match="None of the 4 parameters"):
        build(net().requires_grad_(False))

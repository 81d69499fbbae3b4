"""A saved state continues bit-identically, survives its hosts, and is refused where it does not belong."""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from badam import BlockOptimizer
from badam.errors import StateError
from tests.badam.optim.tiny_net import CountingSGD, Net, adamw, blocks, loss_of, net

STEPS = 20


def grouped(model: nn.Module) -> torch.optim.Optimizer:
    """No-decay group first, as some hosts list it."""
    parameters = dict(model.named_parameters())
    norms = [parameter for name, parameter in parameters.items() if "norm" in name]
    rest = [parameter for name, parameter in parameters.items() if "norm" not in name]
    return adamw([{"params": norms, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.1, "lr": 3e-3}])


def run(model: Net, optimizer: BlockOptimizer, first: int, end: int) -> list[float]:
    losses = []
    for step in range(first, end):
        loss = loss_of(model, step, routed=step % 3 > 0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def through_a_file(content: Any) -> Any:
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@given(
    stop=st.integers(0, STEPS - 1),
    mode=st.sampled_from(["random", "descending"]),
    model_first=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
@settings(max_examples=20, deadline=None)
def test_a_run_resumed_at_any_step_equals_the_uninterrupted_one(
    stop: int, mode: Any, model_first: bool, dtype: torch.dtype
) -> None:
    options = {"switch_block_every": 3, "switch_mode": mode, "seed": 5}
    whole = net(dtype)
    expected = run(whole, blocks(whole, grouped(whole), **options), 0, STEPS)

    first = net(dtype)
    optimizer = blocks(first, grouped(first), **options)
    losses = run(first, optimizer, 0, stop)
    weights, state = through_a_file((first.state_dict(), optimizer.state_dict()))

    resumed = net(dtype)
    optimizer = blocks(resumed, grouped(resumed), **options)
    loads = [lambda: resumed.load_state_dict(weights), lambda: optimizer.load_state_dict(state)]
    for load in loads if model_first else reversed(loads):
        load()
    losses += run(resumed, optimizer, stop, STEPS)
    assert losses == expected
    assert all(torch.equal(p, whole.get_parameter(name)) for name, p in resumed.named_parameters())


def test_counters_that_a_base_optimizer_keeps_in_its_groups_resume_too() -> None:
    counts = []
    for stop in (0, 4):
        model = net(torch.float32)
        optimizer = blocks(model, CountingSGD(model.parameters(), lr=0.1), switch_block_every=3)
        for step in range(7):
            if step and step == stop:
                saved = through_a_file(optimizer.state_dict())
                optimizer = blocks(model, CountingSGD(model.parameters(), lr=0.1), switch_block_every=3)
                optimizer.load_state_dict(saved)
            loss_of(model, step).backward()
            optimizer.step()
            counts.append(optimizer.param_groups[0].get("count"))
    assert counts == [1, 2, None, 1, 2, None, 1] * 2


def test_the_saved_order_and_position_win_over_the_constructor() -> None:
    model, other = net(), net()
    optimizer = blocks(model, switch_block_every=3, switch_mode="random", seed=7, start_block=1)
    run(model, optimizer, 0, 5)
    second = blocks(other, switch_block_every=50)
    second.load_state_dict(optimizer.state_dict())
    assert second.schedule == optimizer.schedule
    assert (second.global_step, second.visit, second.steps_in_visit) == (5, 1, 2)
    assert second.current_block_idx == optimizer.current_block_idx


def test_two_optimizers_share_nothing_after_loading() -> None:
    model, other = net(), net()
    optimizer, second = blocks(model, switch_block_every=0), blocks(other, switch_block_every=0)
    run(model, optimizer, 0, 2)
    other.load_state_dict(model.state_dict())
    second.load_state_dict(optimizer.state_dict())
    kept = {name: master.detach().clone() for name, master in second.masters.items()}
    moments = [entry["exp_avg"].clone() for entry in second.state.values()]
    run(model, optimizer, 2, 6)
    assert all(torch.equal(master, kept[name]) for name, master in second.masters.items())
    assert all(
        torch.equal(entry["exp_avg"], saved) for entry, saved in zip(second.state.values(), moments, strict=True)
    )


def test_the_round_trip_of_accelerate_changes_nothing() -> None:
    from accelerate import Accelerator

    whole, prepared = net(), net()
    expected = run(whole, blocks(whole, grouped(whole), switch_block_every=3), 0, 8)
    optimizer = blocks(prepared, grouped(prepared), switch_block_every=3)
    run(prepared, optimizer, 0, 4)
    accelerator = Accelerator(cpu=True)
    wrapped = accelerator.prepare_optimizer(optimizer, device_placement=True)
    assert wrapped.optimizer is optimizer
    assert run(prepared, optimizer, 4, 8) == expected[4:]


def test_wrapping_before_the_first_step_makes_no_masters() -> None:
    model = net()
    optimizer = blocks(model)
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.masters


def test_hooks_learn_of_the_block_that_loading_makes_active() -> None:
    model = net()
    optimizer = blocks(model, switch_block_every=2)
    saved = optimizer.state_dict()
    run(model, optimizer, 0, 3)
    seen: list[int] = []
    optimizer.register_switch_hook(lambda switched: seen.append(switched.current_block_idx))
    optimizer.load_state_dict(saved)
    assert seen == [1, 0]
    assert {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad} == {"0"}


def test_loading_writes_no_weight() -> None:
    model = net()
    optimizer = blocks(model, switch_block_every=0)
    run(model, optimizer, 0, 2)
    saved = optimizer.state_dict()
    fresh = net()
    before = {name: parameter.detach().clone() for name, parameter in fresh.named_parameters()}
    blocks(fresh).load_state_dict(saved)
    assert all(torch.equal(parameter, before[name]) for name, parameter in fresh.named_parameters())


def test_schedulers_continue_after_loading() -> None:
    model = net()
    optimizer = blocks(model, switch_block_every=2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    run(model, optimizer, 0, 1)
    scheduler.step()
    saved = optimizer.state_dict()
    rate = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = 9.0
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == rate
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert optimizer.state is optimizer.base_optimizer.state
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == rate / 2


def changed_state(change: Any) -> Any:
    state = blocks(net()).state_dict()
    change(state)
    return state


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: blocks(net(layers=4)).state_dict(), "another model: 24 parameters there, 19 here"),
        (lambda: blocks(net(), block_prefix_list=["layers.0", "layers.1"]).state_dict(), "2 blocks there, 3 here"),
        (
            lambda: blocks(net(), block_prefix_list=["layers.0", "layers.2", "layers.1"]).state_dict(),
            "block 1 is the first that differs",
        ),
        (lambda: blocks(net(), active_modules=["head"]).state_dict(), "another partition"),
        (lambda: blocks(model := net(), grouped(model)).state_dict(), "parameter groups of"),
        (lambda: adamw(net().parameters()).state_dict(), "no block of this model"),
        (lambda: changed_state(lambda state: state["badam"].update(format=3)), "format 3"),
        (lambda: changed_state(lambda state: state["badam"].pop("masters")), "lacks 'masters'"),
        (dict, "not an optimizer state of badam"),
    ],
)
def test_a_state_that_does_not_belong_here_is_refused_and_changes_nothing(make: Any, words: str) -> None:
    model = net()
    optimizer = blocks(model, switch_block_every=4)
    run(model, optimizer, 0, 2)
    before = {name: master.detach().clone() for name, master in optimizer.masters.items()}
    with pytest.raises(StateError) as caught:
        optimizer.load_state_dict(make())
    assert words in str(caught.value)
    assert caught.value.advice or "format" in words or "lacks" in words
    assert (optimizer.global_step, optimizer.steps_in_visit, len(optimizer.state)) == (2, 2, 5)
    assert all(torch.equal(master, before[name]) for name, master in optimizer.masters.items())


def state_of_1_4(model: nn.Module, prefix: str, steps: int) -> dict[str, Any]:
    """What badam 1.4 saves: its base optimizer over the active block, without and with ``bias`` in the name."""
    active = {name: nn.Parameter(p.detach().float()) for name, p in model.named_parameters() if name.startswith(prefix)}
    groups = [[p for name, p in active.items() if ("bias" in name) == bias] for bias in (False, True)]
    base = torch.optim.AdamW([{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}], lr=0.125)
    for step in range(steps):
        for parameter in active.values():
            parameter.grad = torch.full_like(parameter, 0.5 + step)
        base.step()
    return base.state_dict()


def test_a_state_of_1_4_that_fits_one_block_is_used_there_and_the_rest_is_named() -> None:
    model = net()
    optimizer = blocks(model, include_lm_head=True, switch_block_every=10)
    with pytest.warns(UserWarning, match=r"1\.4, which did not save .*masters.* 3 steps into the visit"):
        optimizer.load_state_dict(state_of_1_4(model, "head", steps=3))
    assert optimizer.current_block.name == "lm_head"
    assert optimizer.steps_in_visit == 3
    assert {int(entry["step"]) for entry in optimizer.state.values()} == {3}
    moments = {tuple(entry["exp_avg"].shape) for entry in optimizer.state.values()}
    assert moments == {(2, 8), (2,)}
    assert optimizer.param_groups[0]["lr"] == 1e-2  # per-group rates are the user's; 1.4 had lost them
    loss_of(model, 0).backward()
    optimizer.step()


@pytest.mark.parametrize("steps", [0, 3])
def test_a_state_of_1_4_that_fits_several_blocks_or_none_is_left_out_and_said(steps: int) -> None:
    model = net()
    optimizer = blocks(model)
    with pytest.warns(UserWarning, match=r"not used: training goes on with a fresh visit to layers\.0"):
        optimizer.load_state_dict(state_of_1_4(model, "layers.1", steps))
    assert not optimizer.state
    assert optimizer.global_step == 0


def test_our_own_states_load_without_a_warning() -> None:
    optimizer = blocks(net())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(optimizer.state_dict())

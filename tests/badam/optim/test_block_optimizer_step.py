"""A step of the active block equals the base optimizer on fp32 copies, and touches nothing else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from badam import optim, phases
from badam.errors import InputError
from badam.optim.active_parameter import HAS_GRAD_DTYPE
from badam.vocabulary import Phase
from tests.badam.optim.tiny_net import LR, FilledWhenBuilt, adamw, blocks, loss_of, net

BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW loop": lambda p: adamw(p, foreach=False),
    "AdamW foreach": lambda p: adamw(p, foreach=True),
    "AdamW fused": lambda p: adamw(p, fused=True),
    "AdamW amsgrad": lambda p: adamw(p, amsgrad=True, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, nesterov=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=LR),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=LR),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=LR),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=LR),
    "filled when built": lambda p: FilledWhenBuilt(p, start=0.25),
}


needs_grad_dtype = pytest.mark.skipif(
    not HAS_GRAD_DTYPE, reason="this torch cannot accumulate a 16-bit gradient in fp32 where hosts see it"
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("base", BASES)
def test_a_visit_equals_the_base_optimizer_on_fp32_copies_bit_for_bit(base: str, dtype: torch.dtype) -> None:
    model, twin = net(dtype), net(dtype)
    inner = BASES[base](model.parameters())
    optimizer = blocks(model, inner, switch_block_every=0, start_block=1)
    active = dict(twin.layers[1].named_parameters())
    copies = {name: nn.Parameter(parameter.detach().float()) for name, parameter in active.items()}
    reference = BASES[base](copies.values())
    for step in range(4):
        loss_of(model, step).backward()
        optimizer.step()
        twin.zero_grad()
        loss_of(twin, step).backward()
        for name, copy in copies.items():
            copy.grad = active[name].grad.float()
        reference.step()
        for name, copy in copies.items():
            active[name].data.copy_(copy)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(name)), name
    state = (
        {name: optimizer.state[optimizer.masters[f"layers.1.{name}"]] for name in copies} if optimizer.masters else {}
    )
    for name, entries in state.items():
        for key, value in entries.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(reference.state[copies[name]][key]))


def test_everything_outside_the_block_is_untouched_and_holds_nothing() -> None:
    model = net()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = blocks(model, switch_block_every=0, start_block=1)
    for step in range(3):
        loss_of(model, step).backward()
        assert {m.name for m in optimizer.active_parameters if m.gradient is not None} == {
            name for name in before if name.startswith("layers.1.")
        }
        assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("layers.1."))
        optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if name.startswith("layers.1.")}
    assert len(optimizer.state) == len(optimizer.masters) == 5
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("options", [{}, {"max_block_parameters": 80}])
def test_gradients_may_be_set_by_hand(options: dict[str, Any]) -> None:
    model = net(torch.float32)
    optimizer = blocks(model, torch.optim.SGD(model.parameters(), lr=1.0), switch_block_every=0, **options)
    before = model.layers[0].linear.weight.detach().clone()
    model.layers[0].linear.weight.grad = torch.ones_like(before)
    assert float(optimizer.clip_grad_norm_(1e9)) == pytest.approx(32**0.5 if options else 8.0)
    optimizer.step()
    rows = 4 if options else 8
    torch.testing.assert_close(model.layers[0].linear.weight[:rows], before[:rows] - 1)


def test_every_visit_starts_with_fresh_moments_and_step_count() -> None:
    model = net()
    optimizer = blocks(model, switch_block_every=3)
    for step in range(7):
        loss_of(model, step).backward()
        optimizer.step()
        counts = {int(entries["step"]) for entries in optimizer.state.values()}
        assert counts == ({step % 3 + 1} if (step + 1) % 3 else set())


def test_a_base_that_fills_its_state_when_built_starts_afresh_in_every_visit() -> None:
    model = net()
    base = FilledWhenBuilt(model.parameters(), start=0.25)
    optimizer = blocks(model, base, switch_block_every=2, switch_mode="ascending", start_block=0)
    for step in range(5):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    third = [parameter for parameter in model.layers[2].parameters() if parameter.requires_grad]
    sums = [state["sum"] for state in base.state.values()]
    assert [total.shape for total in sums] == [parameter.shape for parameter in third]
    assert all(bool((total >= 0.25).all()) for total in sums)


def test_gradients_accumulate_in_fp32() -> None:
    model, wide = net(), net()
    optimizer = blocks(model, switch_block_every=0)
    parameter, twin = model.layers[0].linear.weight, wide.layers[0].linear.weight
    total = torch.zeros(twin.shape)
    for micro in range(8):
        loss_of(model, micro).backward()
        wide.zero_grad()
        loss_of(wide, micro).backward()
        total += twin.grad.float()
    gradient = next(m.gradient for m in optimizer.active_parameters if m.parameter is parameter)
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, total)


@needs_grad_dtype
def test_hosts_clip_what_the_step_uses_with_a_norm_in_fp32() -> None:
    model, twin = net(), net()
    by_torch, by_method = blocks(model, switch_block_every=0), blocks(twin, switch_block_every=0)
    for each in (model, twin):
        (loss_of(each, 0) * 100).backward()
    exact = torch.linalg.vector_norm(torch.cat([m.gradient.flatten().double() for m in by_torch.active_parameters]))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(float(exact), rel=1e-6)
    assert float(by_method.clip_grad_norm_(0.5)) == pytest.approx(float(exact), rel=1e-6)
    by_torch.step()
    by_method.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, twin.get_parameter(name))


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    model = net()
    optimizer = blocks(model, switch_block_every=0)
    expert = model.layers[0].expert.weight
    kept = expert.detach().clone()
    for step in range(3):
        loss_of(model, step, routed=False).backward()
        optimizer.step()
    assert torch.equal(expert, kept)
    assert "layers.0.expert.weight" not in optimizer.masters
    loss_of(model, 3, routed=True).backward()
    optimizer.step()
    assert not torch.equal(expert, kept)


def test_a_step_without_any_gradient_changes_nothing_and_counts() -> None:
    model = net()
    optimizer = blocks(model, switch_block_every=2)
    optimizer.step()
    assert (optimizer.global_step, optimizer.current_block_idx) == (1, 0)
    optimizer.step()
    assert (optimizer.global_step, optimizer.current_block_idx) == (2, 1)


def test_the_loss_of_a_closure_is_returned_and_it_runs_once_with_gradients() -> None:
    model = net()
    optimizer = blocks(model, switch_block_every=0)
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        calls.append(loss)
        return loss

    weight = model.layers[0].linear.weight
    before = weight.detach().clone()
    assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_non_finite_gradient_skips_the_step_and_is_reported(bad: float) -> None:
    model = net()
    said: list[str] = []
    optimizer = blocks(model, switch_block_every=2, verbose=1, log_fn=said.append)
    loss_of(model, 0).backward()
    optimizer.step()
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    moments = {key: entry["exp_avg"].clone() for key, entry in optimizer.state.items()}
    loss_of(model, 1).backward()
    optimizer.active_parameters[1].gradient[3] = bad  # after backward, as clipping by an infinite norm would
    optimizer.step()
    assert optimizer.non_finite_steps == 1
    assert (optimizer.global_step, optimizer.steps_in_visit) == (1, 1)
    assert all(torch.equal(parameter, kept[name]) for name, parameter in model.named_parameters())
    assert all(torch.equal(entry["exp_avg"], moments[key]) for key, entry in optimizer.state.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert any("layers.0" in text and "1 skipped" in text for text in said)
    loss_of(model, 2).backward()
    optimizer.step()
    assert (optimizer.global_step, optimizer.current_block_idx) == (2, 1)


def test_a_non_finite_gradient_that_backward_makes_skips_the_step() -> None:
    model = net()
    optimizer = blocks(model, switch_block_every=0)
    (loss_of(model, 0) * torch.inf).backward()
    optimizer.step()
    assert optimizer.non_finite_steps == 1
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@needs_grad_dtype
def test_fp16_trains_under_a_gradient_scaler_and_survives_an_overflow() -> None:
    model = net(torch.float16)
    optimizer = blocks(model, switch_block_every=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=100)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for step in range(4):
        loss = loss_of(model, step) * (1e30 if step == 1 else 1)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**13  # one overflow was seen
    assert (optimizer.global_step, optimizer.current_block_idx) == (3, 1)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert not torch.equal(model.layers[0].linear.weight, before["layers.0.linear.weight"])


def test_the_step_is_announced_as_one() -> None:
    model = net()
    optimizer = blocks(model, switch_block_every=2)
    seen: list[Phase] = []
    with phases.listening(lambda _, new: seen.append(new)):
        for step in range(2):
            loss_of(model, step).backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
    setup = phases.current()
    assert seen == [Phase.STEP, setup, Phase.STEP, setup] * 2 + [Phase.SWITCH, setup]


def test_zero_grad_in_both_ways() -> None:
    model = net()
    optimizer = blocks(model, switch_block_every=0)
    loss_of(model, 0).backward()
    optimizer.zero_grad(set_to_none=False)
    member = optimizer.active_parameters[0]
    assert member.gradient is not None
    assert not member.gradient.any()
    optimizer.zero_grad()
    assert member.gradient is None


def test_options_out_of_range_are_refused() -> None:
    for options in ({"write_back": "floor"}, {"update": "fast"}):
        with pytest.raises(InputError, match="Choose"):
            blocks(net(), **options)


def test_a_step_is_read_in_four_files() -> None:
    model = net()
    optimizer = blocks(model, switch_block_every=5)
    for _ in range(2):  # the first step makes masters
        loss_of(model, 0).backward()
        entered: set[str] = set()

        def note(frame: FrameType, event: str, _: Any, entered: set[str] = entered) -> None:
            if event == "call":
                entered.add(frame.f_code.co_filename)

        sys.setprofile(note)
        try:
            optimizer.step()
        finally:
            sys.setprofile(None)
    home = Path(optim.__file__).parent
    assert {Path(file).name for file in entered if Path(file).parent == home} == {
        "block.py",
        "master_groups.py",
        "active_parameter.py",
        "master.py",
    }

"""Stepping on each gradient as it appears, in one compiled pass, and on ranges of rows."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from badam import BlockOptimizer
from badam.errors import InputError
from badam.optim.active_parameter import ActiveParameter
from badam.optim.compiled_adamw import CompiledAdamW, _compiled, adamw_and_round_all_
from badam.tensors.functional import adamw_and_round_
from tests.badam.optim.tiny_net import LR, Net, adamw, blocks, loss_of, net


def train(model: Net, optimizer: BlockOptimizer, steps: int, accumulate: int = 1, clip: float = 0.0) -> None:
    for step in range(steps):
        for micro in range(accumulate):
            (loss_of(model, step * accumulate + micro, routed=step != 2) / accumulate).backward()
        if clip:
            optimizer.clip_grad_norm_(clip)
        optimizer.step()
        optimizer.zero_grad()


def assert_equal(model: nn.Module, twin: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(name)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_releasing_gradients_equals_stepping_on_all_of_them(dtype: torch.dtype) -> None:
    model, twin = net(dtype), net(dtype)
    train(model, blocks(model, switch_block_every=3, gradient_release=True), 8)
    train(twin, blocks(twin, switch_block_every=3), 8)
    assert_equal(model, twin)


def test_no_two_released_gradients_exist_at_once() -> None:
    model = net()
    optimizer = blocks(model, switch_block_every=0, gradient_release=True)
    gradients: list[Any] = []
    alive: list[int] = []
    original = optimizer._master_groups.step

    def step(members: list[ActiveParameter]) -> None:
        gradients.extend(weakref.ref(member.gradient) for member in members)
        alive.append(sum(reference() is not None for reference in gradients))
        original(members)

    optimizer._master_groups.step = step  # type: ignore[method-assign]
    loss_of(model, 0).backward()
    assert alive == [1] * 5
    assert all(parameter.grad is None for parameter in model.parameters())


def test_releasing_refuses_accumulation_and_clipping() -> None:
    model = net()
    optimizer = blocks(model, gradient_release=True)
    loss_of(model, 0).backward()
    with pytest.raises(InputError, match="gradient_release cannot accumulate"):
        loss_of(model, 1).backward()
    with pytest.raises(InputError, match="cannot be clipped together"):
        optimizer.clip_grad_norm_(1.0)


def test_a_released_non_finite_gradient_is_skipped_and_counted_once_per_step() -> None:
    model = net()
    optimizer = blocks(model, switch_block_every=0, gradient_release=True)
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    (loss_of(model, 0) * torch.nan).backward()
    optimizer.step()
    assert optimizer.non_finite_steps == 1
    assert all(torch.equal(parameter, kept[name]) for name, parameter in model.named_parameters())
    (loss_of(model, 0) * torch.nan).backward()
    optimizer.step()
    assert optimizer.non_finite_steps == 2
    assert optimizer.global_step == 2


def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the pass as it is written: the compiler is tested once, its result everywhere else."""
    monkeypatch.setattr("badam.optim.compiled_adamw._compiled", lambda function: function)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_the_single_pass_agrees_with_adamw(
    dtype: torch.dtype, accumulate: int, clip: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    uncompiled(monkeypatch)
    model, twin = net(dtype), net(dtype)
    options = {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}
    optimizer = blocks(model, adamw(model.parameters(), **options), switch_block_every=0, update="compiled")
    reference = blocks(twin, adamw(twin.parameters(), **options), switch_block_every=0)
    train(model, optimizer, 5, accumulate, clip)
    train(twin, reference, 5, accumulate, clip)
    for member, other in zip(optimizer.active_parameters, reference.active_parameters, strict=True):
        torch.testing.assert_close(member.master, other.master, rtol=2e-3, atol=2e-2 * LR)
    if dtype is torch.float32:
        for member, other in zip(optimizer.active_parameters, reference.active_parameters, strict=True):
            torch.testing.assert_close(member.master, other.master, rtol=1e-6, atol=1e-6)


def test_one_step_of_the_pass_is_adamw_to_the_last_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    uncompiled(monkeypatch)
    model, twin = net(), net()
    optimizer = blocks(model, switch_block_every=0, update="compiled")
    reference = blocks(twin, switch_block_every=0)
    train(model, optimizer, 1)
    train(twin, reference, 1)
    for member, other in zip(optimizer.active_parameters, reference.active_parameters, strict=True):
        torch.testing.assert_close(member.master, other.master, rtol=1e-6, atol=1e-7)
        assert torch.equal(member.weight, member.master.to(torch.bfloat16))
        ours, theirs = optimizer.state[member.master], reference.state[other.master]
        assert ours.keys() == theirs.keys()
        torch.testing.assert_close(ours["exp_avg_sq"], theirs["exp_avg_sq"], rtol=1e-6, atol=0)


def operands(lengths: tuple[int, ...], seed: int) -> tuple[list[list[torch.Tensor]], torch.Tensor]:
    """What the pass takes for bf16 parameters of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for length in lengths:
        gradient, master = (torch.randn(length, generator=generator) for _ in range(2))
        moments = [torch.rand(length, generator=generator) for _ in range(2)]
        tensors.append([gradient.bfloat16(), master, *moments, master.bfloat16()])
    factors = torch.rand(len(lengths), 7, generator=generator) / 10 + 0.8
    return tensors, factors


def test_the_compiled_pass_is_the_written_one() -> None:
    compiled = _compiled(adamw_and_round_all_)
    for seed, lengths in enumerate([(64, 17, 64), (1000, 48, 1000)]):
        (ours, factors), (theirs, _) = operands(lengths, seed), operands(lengths, seed)
        compiled(ours, factors)
        adamw_and_round_all_(theirs, factors)
        for mine, other in zip(ours, theirs, strict=True):
            for tensor, expected in zip(mine, other, strict=True):
                torch.testing.assert_close(
                    tensor, expected, rtol=1e-2 if tensor.dtype == torch.bfloat16 else 1e-5, atol=1e-6
                )


def test_more_combinations_than_the_compiler_bears_are_updated_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    functions: list[Any] = []
    monkeypatch.setattr(
        "badam.optim.compiled_adamw._compiled", lambda function: (functions.append(function), function)[1]
    )
    monkeypatch.setattr("badam.optim.compiled_adamw._combinations", set())
    monkeypatch.setattr("badam.optim.compiled_adamw._MOST_COMBINATIONS", 1)
    model, twin = net(), net()
    train(model, blocks(model, switch_block_every=2, update="compiled"), 2)
    assert set(functions) == {adamw_and_round_all_}
    train(model, second := blocks(model, block_prefix_list=["layers.0.linear"], update="compiled"), 1)
    assert functions[-2:] == [adamw_and_round_, adamw_and_round_]
    train(twin, blocks(twin, switch_block_every=2), 2)
    train(twin, third := blocks(twin, block_prefix_list=["layers.0.linear"]), 1)
    for member, other in zip(second.active_parameters, third.active_parameters, strict=True):
        torch.testing.assert_close(member.master, other.master, rtol=1e-4, atol=1e-3)


def test_a_single_batch_keeps_the_gradient_in_the_models_type_and_several_sum_in_fp32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uncompiled(monkeypatch)
    model = net()
    optimizer = blocks(model, switch_block_every=0, update="compiled")
    loss_of(model, 0).backward()
    first = {member.name: member.gradient for member in optimizer.active_parameters}
    assert {gradient.dtype for gradient in first.values()} == {torch.bfloat16}
    loss_of(model, 1).backward()
    assert {member.gradient.dtype for member in optimizer.active_parameters} == {torch.float32}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_pass_and_the_base_read_each_others_state(monkeypatch: pytest.MonkeyPatch) -> None:
    uncompiled(monkeypatch)
    model, twin = net(), net()
    first, second = blocks(model, switch_block_every=0, update="compiled"), blocks(twin, switch_block_every=0)
    train(model, first, 3)
    twin.load_state_dict(model.state_dict())
    second.load_state_dict(first.state_dict())
    train(twin, second, 2)
    model.load_state_dict(twin.state_dict())
    first.load_state_dict(second.state_dict())
    train(model, first, 1)
    assert {int(entry["step"]) for entry in first.state.values()} == {5, 6}  # one expert was left out once


def test_the_pass_skips_non_finite_gradients_and_forgets_the_clip_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    uncompiled(monkeypatch)
    model, twin = net(), net()
    optimizer = blocks(model, switch_block_every=0, update="compiled")
    reference = blocks(twin, switch_block_every=0, update="compiled")
    (loss_of(model, 0) * torch.inf).backward()
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    assert optimizer.non_finite_steps == 1
    train(model, optimizer, 1)
    train(twin, reference, 1)
    assert_equal(model, twin)


def test_clipping_twice_before_a_pass_clips_to_the_smaller_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    uncompiled(monkeypatch)
    model = net()
    optimizer = blocks(model, switch_block_every=0, update="compiled")
    (loss_of(model, 0) * 100).backward()
    assert float(optimizer.clip_grad_norm_(2.0)) > 2
    assert float(optimizer.clip_grad_norm_(0.5)) == pytest.approx(2.0, rel=1e-4)
    assert float(optimizer.clip_grad_norm_(9.0)) == pytest.approx(0.5, rel=1e-4)


def test_the_pass_runs_on_tensors_without_data() -> None:
    default = torch.get_default_dtype()
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        model = Net()
        torch.set_default_dtype(default)
        optimizer = blocks(model, switch_block_every=2, update="compiled")
        train(model, optimizer, 5, clip=1.0)
        assert len(optimizer.state) == 5


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "SGD"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad"),
        (lambda p: torch.optim.AdamW(p, maximize=True), "maximize"),
    ],
)
def test_what_the_pass_cannot_do_is_refused(base: Any, words: str) -> None:
    model = net()
    with pytest.raises(InputError, match=words) as caught:
        CompiledAdamW(base(model.parameters()))
    assert 'update="base"' in str(caught.value)


def test_a_transposed_parameter_is_trained_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    uncompiled(monkeypatch)
    results = []
    for update in ("base", "compiled"):
        torch.manual_seed(0)
        model = nn.Module()
        model.layers = nn.ModuleList(nn.Linear(6, 6, bias=False, dtype=torch.bfloat16) for _ in range(2))
        model.layers[0].weight = nn.Parameter(torch.randn(6, 6).bfloat16().t())
        optimizer = blocks(model, switch_block_every=0, update=update)
        model.layers[0](torch.ones(2, 6, dtype=torch.bfloat16)).square().sum().backward()
        optimizer.step()
        assert not model.layers[0].weight.is_contiguous()
        results.append(model.layers[0].weight.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_range_of_rows_trains_as_it_would_in_the_whole_matrix(dtype: torch.dtype) -> None:
    model, twin = net(dtype), net(dtype)
    base = {"switch_block_every": 0, "switch_mode": "ascending", "verbose": 0}
    pieces = BlockOptimizer(adamw(model.parameters()), model.named_parameters(), max_block_parameters=80, **base)
    whole = BlockOptimizer(adamw(twin.parameters()), twin.named_parameters(), **base)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert pieces.block_num == 6
    for each, optimizer in ((model, pieces), (twin, whole)):
        # Row-wise updates are independent of each other as long as the gradients are.
        for seed in range(2):
            loss_of(each, seed).backward()
        optimizer.step()
    weight, full = model.layers[0].linear.weight, twin.layers[0].linear.weight
    assert torch.equal(weight[:4], full[:4])
    assert torch.equal(weight[4:], before["layers.0.linear.weight"][4:])
    assert not torch.equal(weight[:4], before["layers.0.linear.weight"][:4])


def test_masters_and_moments_of_a_range_have_its_rows() -> None:
    model = net()
    optimizer = blocks(model, max_block_parameters=80, switch_block_every=2)
    train(model, optimizer, 1)
    assert optimizer.masters["layers.0.linear.weight"].shape == (4, 8)
    assert {tuple(entry["exp_avg"].shape) for entry in optimizer.state.values()} <= {(4, 8), (8,)}
    train(model, optimizer, 2)
    assert optimizer.masters.keys() == {"layers.0.linear.weight", "layers.0.expert.weight"}


@pytest.mark.parametrize("options", [{}, {"update": "compiled"}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gradient_of_a_range_keeps_no_other_rows_alive(dtype: torch.dtype, options: Any) -> None:
    model = net(dtype)
    optimizer = blocks(model, max_block_parameters=80, switch_block_every=0, **options)
    loss_of(model, 0).backward()
    for member in optimizer.active_parameters:
        gradient = member.gradient
        assert gradient.untyped_storage().nbytes() == gradient.numel() * gradient.element_size()


def test_ranges_of_rows_resume_too() -> None:
    options = {"max_block_parameters": 80, "switch_block_every": 3}
    whole, first, second = net(), net(), net()
    train(whole, blocks(whole, **options), 7)
    optimizer = blocks(first, **options)
    for step in range(7):
        if step == 5:
            second.load_state_dict(first.state_dict())
            saved = optimizer.state_dict()
            first, optimizer = second, blocks(second, **options)
            optimizer.load_state_dict(saved)
        loss_of(first, step, routed=step != 2).backward()
        optimizer.step()
    assert_equal(first, whole)


def test_only_the_object_itself_clips_gradients_of_ranges() -> None:
    model = net()
    optimizer = blocks(model, max_block_parameters=80, switch_block_every=0)
    (loss_of(model, 0) * 100).backward()
    assert optimizer.hides_gradients
    assert float(optimizer.clip_grad_norm_(0.5)) > 0.5
    assert float(optimizer.clip_grad_norm_(0.5)) == pytest.approx(0.5, rel=1e-4)


def test_older_torch_accumulates_in_fp32_through_a_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = net(), net()
    expected = blocks(twin, switch_block_every=3)
    monkeypatch.setattr("badam.optim.visit.HAS_GRAD_DTYPE", False)
    optimizer = blocks(model, switch_block_every=3)
    assert optimizer.hides_gradients
    train(model, optimizer, 7, accumulate=3, clip=0.05)
    train(twin, expected, 7, accumulate=3, clip=0.05)
    assert_equal(model, twin)


def test_parameters_that_a_host_has_replaced_are_an_error_and_not_a_run_that_trains_nothing() -> None:
    model = net()
    optimizer = blocks(model)
    for group in optimizer.param_groups:
        group["params"] = [torch.nn.Parameter(parameter.detach().clone()) for parameter in group["params"]]
    with pytest.raises(InputError, match="replaced after this optimizer was built"):
        optimizer.step()

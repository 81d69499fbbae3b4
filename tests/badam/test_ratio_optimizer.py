from __future__ import annotations

import copy
import functools
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from badam import phases
from badam.errors import InputError
from badam.ratio_gradient import WindowGradient
from badam.ratio_optimizer import BlockOptimizerRatio
from badam.vocabulary import Phase


class Net(nn.Module):
    """Two matrices with biases; ``loss`` differs from seed to seed."""

    def __init__(self, width: int = 24, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(width, width, dtype=dtype)
        self.second = nn.Linear(width, width, dtype=dtype)

    def loss(self, seed: int) -> Tensor:
        batch = torch.randn(4, self.first.in_features, generator=torch.Generator().manual_seed(seed))
        output: Tensor = self.second(torch.tanh(self.first(batch.to(self.first.weight.dtype))))
        return output.float().square().mean()


def net(dtype: torch.dtype = torch.bfloat16) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def build(model: nn.Module, **options: Any) -> BlockOptimizerRatio:
    settings = {"update_ratio": 0.1, "switch_every": 3, "preserve_threshold": 10, "lr": 1e-2, "verbose": 0}
    return BlockOptimizerRatio(list(model.parameters()), model.named_parameters(), **{**settings, **options})


def train(model: Net, optimizer: BlockOptimizerRatio, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        model.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: (before[name] != after[name]).flatten().nonzero().flatten().tolist() for name in before}


MODES = ("adjacent", "scatter")


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


# --- the model's weights --------------------------------------------------------------------------------------------


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
        ({"scatter_run": 3}, "no power of two"),
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


# --- other rules ----------------------------------------------------------------------------------------------------


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

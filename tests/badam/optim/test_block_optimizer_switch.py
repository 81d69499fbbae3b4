"""Going from block to block: K steps each, in the order of the schedule, and nothing of the old block left."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from badam import BlockOptimizer, phases
from badam.blocks.names import Block
from badam.blocks.schedule import BlockSchedule
from badam.errors import InputError
from badam.optim.active_parameter import HAS_GRAD_DTYPE
from badam.optim.visit import ActiveBlock
from badam.vocabulary import Phase
from tests.badam.optim.tiny_net import Net, adamw, blocks, loss_of, net


def active_layers(model: nn.Module) -> set[str]:
    return {".".join(name.split(".")[:2]) for name, parameter in model.named_parameters() if parameter.requires_grad}


@given(
    mode=st.sampled_from(["random", "ascending", "descending", "fixed"]),
    every=st.integers(-1, 3),
    start=st.none() | st.integers(0, 2),
    seed=st.integers(0, 3),
)
@settings(max_examples=25, deadline=None)
def test_every_step_trains_the_block_that_the_schedule_names(
    mode: Any, every: int, start: int | None, seed: int
) -> None:
    model = net(torch.float32)
    optimizer = blocks(model, switch_block_every=every, start_block=start, switch_mode=mode, seed=seed)
    schedule = BlockSchedule(mode, every, 3, seed, start)
    for step in range(8):
        expected = schedule.block_at_step(step)
        assert optimizer.current_block_idx == expected
        assert active_layers(model) == {f"layers.{expected}"}
        optimizer.step()
    assert optimizer.global_step == 8


def test_the_attributes_that_other_code_reads() -> None:
    model = net()
    base = adamw(model.parameters())
    optimizer = blocks(model, base, switch_block_every=2, active_modules=["head"])
    assert optimizer.base_optimizer is base
    assert optimizer.block_num == 3
    assert optimizer.block_prefix_list == [["layers.0"], ["layers.1"], ["layers.2"]]
    assert optimizer.active_param_prefixs == ["layers.0", "head"]
    assert optimizer.current_block_idx == 0
    assert (optimizer.switch_mode, optimizer.switch_block_every) == ("ascending", 2)
    assert optimizer.ds_optimizer is None
    names = [name for name, _ in optimizer.named_parameters_list]
    assert {names[index] for index in optimizer.param_idx2lp} == {
        n for n in names if n.startswith(("layers.0", "head"))
    }
    assert optimizer.param_idx2hp == {}
    loss_of(model, 0).backward()
    optimizer.step()
    assert optimizer.param_idx2hp.keys() == optimizer.param_idx2lp.keys()
    assert all(master.dtype == torch.float32 for master in optimizer.param_idx2hp.values())
    assert optimizer.global_step == 1


def test_every_documented_argument_can_be_given_by_position() -> None:
    model = net()
    said: list[str] = []
    optimizer = BlockOptimizer(
        adamw(model.parameters()),
        model.named_parameters(),
        [["layers.0."], ["layers.2."]],
        7,
        1,
        "random",
        ["head."],
        True,
        True,
        2,
        said.append,
        False,
    )
    assert (optimizer.switch_block_every, optimizer.current_block_idx, optimizer.verbose) == (7, 1, 2)
    assert "layers.2" in said[0]
    assert "head.weight" in said[1]


def test_nothing_of_the_old_block_is_alive_after_the_switch() -> None:
    model = net()
    optimizer = blocks(model, switch_block_every=1)
    loss_of(model, 0).backward()
    kept: list[Any] = []
    with phases.listening(
        lambda _, new: kept.extend(map(weakref.ref, alive(optimizer))) if new is Phase.SWITCH else None
    ):
        optimizer.step()
    assert len(kept) == 5 * 3
    gc.collect()
    assert all(reference() is None for reference in kept)
    assert not optimizer.state
    assert not optimizer.masters


def alive(optimizer: BlockOptimizer) -> list[torch.Tensor]:
    moments = [entry[name] for entry in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return [*optimizer.masters.values(), *moments]


def test_the_old_block_is_released_before_the_new_one_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = blocks(model, switch_block_every=0)
    loss_of(model, 0).backward()
    optimizer.step()
    left: list[int] = []
    begin = ActiveBlock.begin

    def counted(block: ActiveBlock, prefixes: list[str]) -> None:
        left.append(len(alive(optimizer)))
        begin(block, prefixes)

    monkeypatch.setattr(ActiveBlock, "begin", counted)
    optimizer.switch_trainable_params()
    assert left == [0]


def test_moments_are_released_before_masters_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = blocks(model, switch_block_every=0)
    loss_of(model, 0).backward()
    optimizer.step()
    states: list[int] = []
    write = type(optimizer).write_back_block
    monkeypatch.setattr(type(optimizer), "write_back_block", lambda self: (states.append(len(self.state)), write(self)))
    optimizer.switch_trainable_params()
    assert states == [0]


def test_hooks_are_called_at_registration_and_after_each_switch() -> None:
    model = net()
    optimizer = blocks(model, switch_block_every=1)
    seen: list[int] = []
    remove = optimizer.register_switch_hook(lambda switched: seen.append(switched.current_block_idx))
    optimizer.step()
    optimizer.switch_trainable_params()
    remove()
    optimizer.step()
    assert seen == [0, 1, 2]


def test_a_parameter_that_the_user_froze_stays_frozen() -> None:
    model = net()
    model.layers[1].norm.weight.requires_grad_(False)
    kept = model.layers[1].norm.weight.detach().clone()
    optimizer = blocks(model, switch_block_every=1)
    for step in range(6):
        loss_of(model, step).backward()
        optimizer.step()
        assert not model.layers[1].norm.weight.requires_grad
    assert torch.equal(model.layers[1].norm.weight, kept)


def test_a_second_optimizer_on_the_same_model_trains_what_the_first_one_froze() -> None:
    model = net()
    model.layers[1].norm.weight.requires_grad_(False)
    blocks(model)
    second = blocks(model, start_block=1)
    assert model.layers[1].linear.weight.requires_grad
    assert not model.layers[1].norm.weight.requires_grad
    assert second.block_num == 3


def test_a_block_that_would_train_nothing_is_named() -> None:
    model = net()
    model.layers[2].requires_grad_(False)
    with pytest.raises(InputError, match=r"layers\.2' would train nothing"):
        blocks(model)
    with pytest.raises(InputError, match=r"layers\.0' would train nothing"):
        blocks(net(), adamw(net().parameters()))


def test_a_stack_that_the_user_froze_as_a_whole_is_left_out() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision, self.language = net().layers, net().layers

    model = Pair()
    model.vision.requires_grad_(False)
    assert [block.name for block in blocks(model).blocks] == [f"language.{index}" for index in range(3)]


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ([["layers.7"]], r"layers\.7"),
        ([["ayers.1"]], "Near matches: layers.1"),
        ([], "holds no blocks"),
        ("abc", "abc"),
    ],
)
def test_blocks_that_match_nothing_are_refused(specs: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        blocks(net(), block_prefix_list=specs)
    assert words.replace("\\", "") in str(caught.value)


def test_blocks_may_be_prefixes_lists_or_blocks_of_a_partition() -> None:
    specs = ["layers.0", ["layers.1.linear", "layers.1.norm"], Block("last", ("layers.2", "head"), 0)]
    optimizer = blocks(net(), block_prefix_list=specs)
    assert [block.name for block in optimizer.blocks] == ["layers.0", "layers.1.linear + layers.1.norm", "last"]
    assert [block.parameters for block in optimizer.blocks] == [152, 88, 170]


def test_embedding_and_head_become_blocks_when_asked() -> None:
    names = [block.name for block in blocks(net(), include_embedding=True, include_lm_head=True).blocks]
    assert names == ["embedding", "layers.0", "layers.1", "layers.2", "lm_head"]


def test_no_parameters_at_all_is_an_error_that_explains_generators() -> None:
    model = net()
    used = model.named_parameters()
    list(used)
    with pytest.raises(InputError, match="generator"):
        BlockOptimizer(adamw(model.parameters()), used)


def test_verbosity(capsys: pytest.CaptureFixture[str]) -> None:
    def said(verbose: int) -> str:
        blocks(net(), verbose=verbose, switch_mode="random").switch_trainable_params()
        return capsys.readouterr().out

    assert said(0) == ""
    order = ", ".join(str(index + 1) for index in BlockSchedule("random", 50, 3).order(0))
    assert f"The order of this block epoch is {order}." in said(1)
    assert "linear.weight" not in said(1)
    assert "linear.weight" in said(2)


def test_the_global_generators_are_never_touched() -> None:
    model = net()
    state = torch.get_rng_state()
    optimizer = blocks(model, switch_block_every=1, switch_mode="random")
    for step in range(6):
        loss_of(model, step).backward()
        optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_visit_to_the_only_block_starts_afresh_too() -> None:
    model = net()
    optimizer = blocks(model, block_prefix_list=[["layers"]], switch_block_every=2)
    for step in range(4):
        loss_of(model, step).backward()
        optimizer.step()
    assert not optimizer.state
    assert optimizer.visit == 2


@pytest.mark.skipif(not HAS_GRAD_DTYPE, reason="this torch cannot accumulate a bf16 gradient in fp32 by itself")
def test_frozen_parameters_get_their_own_gradient_type_back() -> None:
    model = net()
    optimizer = blocks(model, switch_block_every=0)
    assert model.layers[0].linear.weight.grad_dtype == torch.float32
    optimizer.switch_trainable_params()
    assert model.layers[0].linear.weight.grad_dtype == torch.bfloat16


def test_it_runs_on_tensors_without_data() -> None:
    default = torch.get_default_dtype()
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)  # tensors without data cannot be converted in place
        model = Net()
        torch.set_default_dtype(default)
        optimizer = blocks(model, adamw(model.parameters(), fused=True), switch_block_every=2)
        for step in range(5):
            loss_of(model, step).backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
        assert (optimizer.global_step, optimizer.current_block_idx) == (5, 2)
        assert len(optimizer.masters) == 5

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from badam import phases
from badam.checkpointing import checkpoint_layers
from badam.errors import InputError
from badam.vocabulary import Phase
from tests.badam.optim.layered_net import (
    ALL,
    LAYERS,
    TOKENS,
    Net,
    activate,
    assert_bitwise_equal,
    backward,
    net,
    recomputed,
)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    "active", [("",), ("layers.0.",), ("layers.2.", "layers.1."), ("layers.3.",), ("embed",), ("scale",)]
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_bitwise_those_without_checkpointing(
    use_reentrant: bool, active: tuple[str, ...], dropout: float
) -> None:
    model = net(dropout)
    activate(model, *active)
    expected = backward(model, lambda: model(TOKENS))
    checkpointing = checkpoint_layers(model, ALL, use_reentrant=use_reentrant)
    assert_bitwise_equal(backward(model, lambda: model(TOKENS)), expected)
    checkpointing.set_layers(["layers.1", "layers.3"])
    assert_bitwise_equal(backward(model, lambda: model(TOKENS)), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_only_layers_in_which_something_is_differentiated_are_recomputed(use_reentrant: bool) -> None:
    model = net()
    checkpoint_layers(model, ALL, use_reentrant=use_reentrant)
    for active in range(LAYERS):
        activate(model, f"layers.{active}.")
        for layer in model.layers:
            layer.calls.clear()
        backward(model, lambda: model(TOKENS))
        assert recomputed(model) == list(range(active, LAYERS))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_no_graph_is_built_below_the_active_block(use_reentrant: bool) -> None:
    model = net()
    checkpoint_layers(model, ALL, use_reentrant=use_reentrant)
    activate(model, "layers.2.")
    needs_grad: list[bool] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: needs_grad.append(output[0].requires_grad))
    model(TOKENS)
    assert needs_grad == [False, False, True, True]


def test_the_list_of_layers_may_change_to_any_subset() -> None:
    model = net()
    activate(model, "layers.")
    checkpointing = checkpoint_layers(model, [])
    for subset in ([0, 1, 2, 3], [2], [], [0, 3], [1, 2]):
        checkpointing.set_layers([f"layers.{index}" for index in subset])
        assert checkpointing.layers == tuple(f"layers.{index}" for index in subset)
        backward(model, lambda: model(TOKENS))
        assert recomputed(model) == subset


def test_without_gradients_nothing_is_checkpointed() -> None:
    model = net()
    saved: list[torch.Tensor] = []
    checkpoint_layers(model, ALL)
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        assert not model(TOKENS).requires_grad
    assert not saved


def test_a_checkpointed_layer_keeps_its_inputs_only() -> None:
    def kept_bytes(model: Net) -> int:
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(TOKENS)
        kept = {p.untyped_storage().data_ptr() for p in model.parameters()}
        del loss
        return sum(size for pointer, size in seen.items() if pointer not in kept)

    model = net()
    activate(model, "layers.")
    without = kept_bytes(model)
    checkpoint_layers(model, ALL)
    hidden = TOKENS.numel() * 8 * 4
    with_checkpoints = kept_bytes(model)
    assert without == (2 * LAYERS + 1) * hidden  # inputs of the linear and output of the tanh; input of the loss
    assert with_checkpoints == (LAYERS + 1) * hidden


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_random_state_is_saved_only_for_layers_that_draw(use_reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    original = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: saved.append(1) or original())
    model = net(dropout=0.3)
    checkpoint_layers(model, ALL, use_reentrant=use_reentrant)
    model.eval()
    model(TOKENS)
    assert not saved
    model.train()
    model.layers[0].dropout.p = 0.0
    model(TOKENS)
    assert len(saved) == LAYERS - 1
    for layer in model.layers:
        layer.dropout.p = 0.0
    model.layers[2].attention_dropout = 0.1  # as attention modules keep it, for the functional form
    saved.clear()
    model(TOKENS)
    assert len(saved) == 1
    checkpoint_layers(model, ALL, use_reentrant=use_reentrant, preserve_rng_state=True)
    saved.clear()
    model(TOKENS)
    assert len(saved) == LAYERS


def test_backward_twice_through_a_kept_graph() -> None:
    model = net()
    checkpoint_layers(model, ALL)
    loss = model(TOKENS)
    loss.backward(retain_graph=True)
    first = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss.backward()
    assert_bitwise_equal({name: p.grad for name, p in model.named_parameters()}, first)
    assert phases.current() is Phase.SETUP


def test_removal_leaves_the_modules_as_they_were() -> None:
    model = net()
    before = [dict(layer.__dict__) for layer in model.layers]
    checkpointing = checkpoint_layers(model, ALL)
    assert all("forward" in layer.__dict__ for layer in model.layers)
    checkpointing.remove()
    assert [layer.__dict__.keys() for layer in model.layers] == [state.keys() for state in before]


def test_a_forward_set_by_someone_else_is_called_and_restored() -> None:
    model = net()
    layer = model.layers[1]
    calls: list[int] = []
    inner = layer.forward

    def theirs(*args: torch.Tensor, **kwargs: tuple[torch.Tensor, float]) -> object:
        calls.append(1)
        return inner(*args, **kwargs)

    layer.forward = theirs
    checkpointing = checkpoint_layers(model, ["layers.1"])
    backward(model, lambda: model(TOKENS))
    assert len(calls) == 2
    checkpointing.remove()
    assert layer.__dict__["forward"] is theirs


def test_a_wrapper_put_on_top_later_survives_removal_and_sees_no_recomputation() -> None:
    model = net()
    layer = model.layers[1]
    checkpointing = checkpoint_layers(model, ["layers.1"])
    ours = layer.forward
    layer.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    checkpointing.remove()
    backward(model, lambda: model(TOKENS))
    assert recomputed(model) == []


def test_a_second_call_takes_over_from_the_first() -> None:
    model = net()
    first = checkpoint_layers(model, ALL)
    checkpoint_layers(model, ["layers.3"])
    backward(model, lambda: model(TOKENS))
    assert recomputed(model) == [3]
    first.remove()
    backward(model, lambda: model(TOKENS))
    assert recomputed(model) == [3]


def test_a_deep_copy_and_a_pickle_run_their_own_layers() -> None:
    model = net()
    checkpoint_layers(model, ALL)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert twin(TOKENS).item() == 0.0
        backward(twin, lambda twin=twin: twin(TOKENS))
        assert recomputed(twin) == [0, 1, 2, 3]
    assert model(TOKENS).item() > 0.0


def test_one_module_at_two_paths_is_wrapped_once() -> None:
    model = net()
    model.layers[2] = model.layers[1]
    checkpointing = checkpoint_layers(model, ["layers.1", "layers.2"])
    checkpointing.set_layers(["layers.2"])
    backward(model, lambda: model(TOKENS))
    assert model.layers[1].calls.count(Phase.RECOMPUTE) == 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_runs_on_fake_tensors(use_reentrant: bool) -> None:
    with FakeTensorMode():
        model = Net(dropout=0.1)
        checkpoint_layers(model, ALL, use_reentrant=use_reentrant)
        activate(model, "layers.1.")
        backward(model, lambda: model(torch.zeros(2, 6, dtype=torch.long)))
        assert recomputed(model) == [1, 2, 3]


def test_an_unknown_layer_is_refused_and_nothing_changes() -> None:
    model = net()
    checkpointing = checkpoint_layers(model, ["layers.0"])
    with pytest.raises(InputError, match=r"no module 'layer\.1'.*Similar: .*layers\.1"):
        checkpointing.set_layers(["layers.2", "layer.1"])
    with pytest.raises(InputError, match=r"'layers' is a ModuleList.*layers\.0"):
        checkpointing.set_layers(["layers"])
    with pytest.raises(InputError, match="list of module paths"):
        checkpointing.set_layers("layers.0")
    assert checkpointing.layers == ("layers.0",)

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from badam import phases
from badam.checkpointing import BlockAwareCheckpoint, checkpoint_layers, enable_for_transformers
from badam.errors import InputError
from badam.vocabulary import Phase

LAYERS = 4


class Layer(nn.Module):
    """A plain layer with positional, keyword and nested arguments, that counts its calls by phase."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.calls: list[Phase] = []

    def forward(self, x: torch.Tensor, *, scale: tuple[torch.Tensor, float]) -> tuple[torch.Tensor, dict[str, object]]:
        self.calls.append(phases.current())
        return x + self.dropout(torch.tanh(self.linear(x))) * scale[0] * scale[1], {"calls": len(self.calls)}


class Net(nn.Module):
    def __init__(self, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.layers = nn.ModuleList(Layer(width, dropout) for _ in range(LAYERS))
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x, _ = layer(x, scale=(self.scale, 0.5))
        loss: torch.Tensor = x.square().mean()
        return loss


def net(dropout: float = 0.0) -> Net:
    torch.manual_seed(0)
    return Net(dropout=dropout)


TOKENS = torch.arange(12).reshape(2, 6)
ALL = [f"layers.{index}" for index in range(LAYERS)]


def activate(model: nn.Module, *prefixes: str) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(name.startswith(prefix) for prefix in prefixes))


def backward(model: nn.Module, loss: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    with phases.within(Phase.FORWARD):
        value = loss()
    with phases.within(Phase.BACKWARD):
        value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_bitwise_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert expected
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def recomputed(model: Net) -> list[int]:
    """Layers that ran forward once more in the recompute phase; clears the record."""
    counts = [layer.calls.count(Phase.RECOMPUTE) for layer in model.layers]
    for layer in model.layers:
        assert layer.calls.count(Phase.FORWARD) == 1
        assert Phase.BACKWARD not in layer.calls
        layer.calls.clear()
    assert max(counts) <= 1
    return [index for index, count in enumerate(counts) if count]


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


# --- transformers ---------------------------------------------------------------------------------------------------


def llama(**options: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, **sizes, **options))
    model.train()
    return model


def llama_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return backward(model, lambda: model(input_ids=TOKENS, labels=TOKENS).loss)


LLAMA_LAYERS = [f"model.layers.{index}" for index in range(LAYERS)]


def count_forwards(model: LlamaForCausalLM) -> list[list[Phase]]:
    """Phases in which each layer's attention was called, one list per layer."""
    calls: list[list[Phase]] = [[] for _ in range(LAYERS)]
    for layer, record in zip(model.model.layers, calls, strict=True):
        layer.self_attn.register_forward_pre_hook(lambda *_args, record=record: record.append(phases.current()))
    return calls


def recomputed_layers(calls: list[list[Phase]]) -> list[int]:
    return [index for index, record in enumerate(calls) if Phase.RECOMPUTE in record]


@pytest.mark.parametrize("attention_dropout", [0.0, 0.2])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_llama_gradients_are_bitwise_equal_though_caching_is_on_by_default(
    use_reentrant: bool, attention_dropout: float
) -> None:
    model = llama(attention_dropout=attention_dropout)
    assert model.config.use_cache
    activate(model, "model.layers.1.", "model.layers.2.")
    expected = llama_gradients(model)
    calls = count_forwards(model)
    checkpoint_layers(model, LLAMA_LAYERS, use_reentrant=use_reentrant)
    assert_bitwise_equal(llama_gradients(model), expected)
    assert recomputed_layers(calls) == [1, 2, 3]


def test_a_cache_in_evaluation_is_used_not_dropped() -> None:
    model = llama().eval()
    checkpoint_layers(model, LLAMA_LAYERS)
    prefix = model(input_ids=TOKENS[:, :3], use_cache=True).past_key_values
    assert prefix.get_seq_length() == 3
    continued = model(input_ids=TOKENS[:, 3:], past_key_values=prefix).logits
    torch.testing.assert_close(continued, model(input_ids=TOKENS).logits[:, 3:])


def test_a_cache_is_written_where_nothing_is_differentiated() -> None:
    model = llama()
    checkpoint_layers(model, LLAMA_LAYERS)
    with torch.no_grad():
        assert model(input_ids=TOKENS, use_cache=True).past_key_values.get_seq_length() == TOKENS.shape[1]


def switch_on(model: nn.Module, **settings: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(settings)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("attention_dropout", [0.0, 0.2])
def test_transformers_own_checkpointing_becomes_block_aware(use_reentrant: bool, attention_dropout: float) -> None:
    model = llama(attention_dropout=attention_dropout)
    activate(model, "model.layers.2.")
    expected = llama_gradients(model)
    switch_on(model, use_reentrant=use_reentrant)
    switch_on(model, use_reentrant=use_reentrant)  # the trainer and the user may both do it
    enable_for_transformers(model)
    enable_for_transformers(model)
    calls = count_forwards(model)
    assert not model.get_input_embeddings()(TOKENS).requires_grad
    assert_bitwise_equal(llama_gradients(model), expected)
    assert recomputed_layers(calls) == [2, 3]


def test_transformers_settings_given_by_the_user_stay_in_force() -> None:
    model = llama()
    switch_on(model, use_reentrant=False, preserve_rng_state=True)
    for layer in model.model.layers[1::2]:  # as transformers' every_n_layers=2 does
        layer.gradient_checkpointing = False
    enable_for_transformers(model)
    calls = count_forwards(model)
    llama_gradients(model)
    assert recomputed_layers(calls) == [0, 2]
    function = model.model.layers[0]._gradient_checkpointing_func
    assert function.settings == {"use_reentrant": False, "preserve_rng_state": True}


@pytest.mark.parametrize("wrapped", [functools.partial(checkpoint, use_reentrant=True), checkpoint])
def test_a_wrapped_checkpoint_function_that_looks_at_the_layer_is_seen_through(wrapped: Any) -> None:
    """LLaMA-Factory's: it reads ``__self__`` of what it is given and makes the first input require grad."""

    @functools.wraps(wrapped)
    def looks_at_the_layer(function: Any, *args: Any, **kwargs: Any) -> Any:
        module = (function.func if isinstance(function, functools.partial) else function).__self__
        if any(parameter.requires_grad for parameter in module.parameters()):
            args[0].requires_grad_(True)
        return wrapped(function, *args, **kwargs)

    model = llama()
    activate(model, "model.layers.2.")
    expected = llama_gradients(model)
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = looks_at_the_layer
    enable_for_transformers(model)
    calls = count_forwards(model)
    assert_bitwise_equal(llama_gradients(model), expected)
    assert recomputed_layers(calls) == [2, 3]


def test_layers_that_transformers_checkpoints_are_left_to_it() -> None:
    model = llama()
    activate(model, "model.layers.2.")
    switch_on(model, use_reentrant=False)
    enable_for_transformers(model)
    checkpoint_layers(model, LLAMA_LAYERS)
    calls = count_forwards(model)
    llama_gradients(model)
    assert [len(record) for record in calls] == [1, 1, 2, 2]


def test_a_model_without_checkpointing_is_left_alone() -> None:
    model = llama()
    enable_for_transformers(model)
    calls = count_forwards(model)
    llama_gradients(model)
    assert recomputed_layers(calls) == []


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gpt2_with_its_dropouts(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=3, n_head=2)).train()
    activate(model, "transformer.h.1.")
    expected = llama_gradients(model)
    checkpoint_layers(model, [f"transformer.h.{index}" for index in range(3)], use_reentrant=use_reentrant)
    assert_bitwise_equal(llama_gradients(model), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("form", ["bound method", "partial of a bound method", "closure"])
def test_older_forms_of_the_checkpointed_function(use_reentrant: bool, form: str) -> None:
    model = net()
    run = BlockAwareCheckpoint(functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=use_reentrant))

    def loss() -> torch.Tensor:
        x = model.embed(TOKENS)
        for layer in model.layers:
            scale = (model.scale, 0.5)
            if form == "bound method":
                x, _ = run(functools.partial(layer.__call__, scale=scale), x)
            elif form == "partial of a bound method":
                x, _ = run(functools.partial(functools.partial(layer.__call__), scale=scale), x)
            else:
                x, _ = run(lambda x, layer=layer, scale=scale: layer(x, scale=scale), x)
        return x.square().mean()

    activate(model, "layers.2.")
    expected = backward(model, lambda: model(TOKENS))
    for layer in model.layers:
        layer.calls.clear()
    assert_bitwise_equal(backward(model, loss), expected)
    assert recomputed(model) == [2, 3]

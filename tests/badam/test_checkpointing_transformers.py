"""Activation checkpointing of transformers' models, their own switch included."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from badam import phases
from badam.checkpointing import BlockAwareCheckpoint, checkpoint_layers, enable_for_transformers
from badam.vocabulary import Phase
from tests.badam.optim.layered_net import LAYERS, TOKENS, activate, assert_bitwise_equal, backward, net, recomputed


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

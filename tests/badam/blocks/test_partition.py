"""Blocks are found from structure, on any Hugging Face model, and every parameter of a layer lies in exactly one."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from badam.blocks.partition import (
    STRATEGIES,
    Block,
    ParameterInfo,
    belongs,
    layer_paths,
    layer_stacks,
    partition_parameters,
    rows_of,
    split_by_rows,
)
from badam.errors import InputError

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 48,
    "pad_token_id": 0,
}
BERT = {key: value for key, value in SMALL.items() if key not in ("num_key_value_heads", "head_dim")}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}

MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (AutoModelForCausalLM, SMALL),
    "mistral": (AutoModelForCausalLM, SMALL),
    "qwen2": (AutoModelForCausalLM, SMALL),
    "qwen3": (AutoModelForCausalLM, SMALL),
    "gemma2": (AutoModelForCausalLM, SMALL),
    "phi3": (AutoModelForCausalLM, SMALL),
    "phi": (AutoModelForCausalLM, SMALL),
    "gpt2": (AutoModelForCausalLM, {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 200}),
    "gpt_neox": (AutoModelForCausalLM, BERT),
    "bert": (AutoModelForMaskedLM, BERT),
    "roberta": (AutoModelForSequenceClassification, BERT),
    "t5": (AutoModelForSeq2SeqLM, {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}),
    "vit": (AutoModelForImageClassification, BERT),
    "mixtral": (AutoModelForCausalLM, {**SMALL, **EXPERTS}),
    "qwen3_moe": (AutoModelForCausalLM, {**SMALL, **EXPERTS}),
}


def infos(kind: str, **changes: Any) -> list[ParameterInfo]:
    auto, settings = MODELS[kind]
    with torch.device("meta"):
        model = auto.from_config(CONFIG_MAPPING[kind](**{**settings, **changes}))
    model.tie_weights()
    return [ParameterInfo(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


@pytest.fixture(scope="module", params=sorted(MODELS))
def model(request: pytest.FixtureRequest) -> tuple[str, list[ParameterInfo]]:
    return request.param, infos(request.param)


def owners(parameter: ParameterInfo, blocks: tuple[Block, ...]) -> list[str]:
    return [block.name for block in blocks if belongs(parameter.name, block.prefixes)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_parameter_of_a_layer_lies_in_exactly_one_block(
    model: tuple[str, list[ParameterInfo]], strategy: Any
) -> None:
    _, parameters = model
    blocks = partition_parameters(parameters, strategy, include_embedding=True, include_lm_head=True)
    layers = layer_paths(parameter.name for parameter in parameters)
    for parameter in parameters:
        count = len(owners(parameter, blocks))
        assert count == 1 if belongs(parameter.name, layers) else count <= 1
    for block in blocks:
        inside = [parameter for parameter in parameters if belongs(parameter.name, block.prefixes)]
        assert block.parameters == sum(parameter.numel for parameter in inside) > 0
    assert len({block.name for block in blocks}) == len(blocks)


def test_what_lies_outside_all_blocks_is_norms_and_their_like(model: tuple[str, list[ParameterInfo]]) -> None:
    _, parameters = model
    blocks = partition_parameters(parameters, "layer", include_embedding=True, include_lm_head=True)
    left = [parameter for parameter in parameters if not owners(parameter, blocks)]
    assert all(len(parameter.shape) == 1 for parameter in left)


def test_attention_and_feed_forward_are_told_apart(model: tuple[str, list[ParameterInfo]]) -> None:
    kind, parameters = model
    blocks = partition_parameters(parameters, "attn-mlp")
    layers = layer_paths(parameter.name for parameter in parameters)
    assert [block.name for block in blocks] == [f"{path}.{part}" for path in layers for part in ("attention", "mlp")]
    for block in blocks:
        inside = [parameter.name for parameter in parameters if belongs(parameter.name, block.prefixes)]
        one_norm_for_both = kind == "phi" and block.name.endswith("mlp")
        assert one_norm_for_both or any("norm" in name.lower() or ".ln_" in name for name in inside)
        mixes = [name for name in inside if "attn" in name.lower() or "attention." in name.lower()]
        assert bool(mixes) == block.name.endswith("attention")


def test_the_norms_of_a_layer_go_with_what_they_feed() -> None:
    def part(kind: str, norm: str) -> str:
        parameters = infos(kind)
        name = next(p.name for p in parameters if f".{norm}." in p.name)
        return owners(ParameterInfo(name, ()), partition_parameters(parameters, "attn-mlp"))[0].rpartition(".")[2]

    assert part("llama", "input_layernorm") == "attention"
    assert part("llama", "post_attention_layernorm") == "mlp"
    assert part("gemma2", "post_attention_layernorm") == "attention"
    assert part("gemma2", "pre_feedforward_layernorm") == "mlp"
    assert part("gemma2", "post_feedforward_layernorm") == "mlp"
    assert part("gpt2", "ln_1") == "attention"
    assert part("gpt2", "ln_2") == "mlp"


def test_each_matrix_is_a_block_with_its_bias(model: tuple[str, list[ParameterInfo]]) -> None:
    _, parameters = model
    for block in partition_parameters(parameters, "matrix"):
        inside = [parameter for parameter in parameters if belongs(parameter.name, block.prefixes)]
        matrices = [parameter for parameter in inside if parameter.is_matrix]
        assert len(matrices) == 1
        stem = matrices[0].name.removesuffix("weight")
        assert all(p in inside for p in parameters if p.name == f"{stem}bias" or p.name == f"{stem}_bias")


def test_fused_experts_are_one_matrix_and_stay_in_their_layer() -> None:
    parameters = infos("qwen3_moe")
    names = [block.name for block in partition_parameters(parameters, "matrix")]
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    assert layer_paths(p.name for p in parameters) == ("model.layers.0", "model.layers.1")


def test_experts_as_modules_stay_in_their_layer() -> None:
    names = [f"model.layers.{n}.moe.experts.{e}.w1.weight" for n in range(2) for e in range(4)]
    assert layer_stacks(names) == (("model.layers.0", "model.layers.1"),)


@pytest.mark.parametrize(
    ("kind", "paths"),
    [
        ("gpt2", ("transformer.h.0", "transformer.h.1")),
        ("gpt_neox", ("gpt_neox.layers.0", "gpt_neox.layers.1")),
        ("bert", ("bert.encoder.layer.0", "bert.encoder.layer.1")),
        ("t5", ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1")),
    ],
)
def test_layers_are_found_whatever_they_are_called(kind: str, paths: tuple[str, ...]) -> None:
    assert layer_paths(parameter.name for parameter in infos(kind)) == paths


def test_a_single_layer_is_a_layer() -> None:
    parameters = infos("llama", num_hidden_layers=1)
    assert [block.name for block in partition_parameters(parameters, "layer")] == ["model.layers.0"]
    parameters = infos("t5", num_layers=1)
    assert [block.name for block in partition_parameters(parameters, "layer")] == ["encoder.block.0", "decoder.block.0"]


def test_layers_need_not_be_called_anything() -> None:
    plain = [ParameterInfo(f"{index}.weight", (4, 4)) for index in (0, 2, 4)]
    assert [block.name for block in partition_parameters(plain, "layer")] == ["0", "2", "4"]


def test_a_head_of_numbered_leaves_is_no_stack_of_layers() -> None:
    names = [f"body.blocks.{n}.fc.weight" for n in range(3)] + ["head.0.weight", "head.2.weight"]
    assert layer_stacks(names) == (("body.blocks.0", "body.blocks.1", "body.blocks.2"),)


def test_embedding_and_head_are_added_exactly_and_only_when_asked() -> None:
    parameters = infos("llama", tie_word_embeddings=False)

    def outside(**options: bool) -> list[tuple[str, ...]]:
        blocks = partition_parameters(parameters, "layer", **options)
        return [block.prefixes for block in blocks if not block.name.startswith("model.layers")]

    assert outside() == []
    assert outside(include_embedding=True) == [("model.embed_tokens",)]
    assert outside(include_lm_head=True) == [("lm_head",)]
    both = partition_parameters(parameters, "layer", include_embedding=True, include_lm_head=True)
    assert [block.name for block in both] == ["embedding", "model.layers.0", "model.layers.1", "lm_head"]


def test_tied_weights_form_one_block() -> None:
    parameters = infos("gpt2")
    for options in ({"include_lm_head": True}, {"include_embedding": True, "include_lm_head": True}):
        blocks = partition_parameters(parameters, "layer", **options)
        assert sum(belongs("transformer.wte.weight", block.prefixes) for block in blocks) == 1
    # The head alone is the token embedding, even where the position table is larger.
    head = partition_parameters(parameters, "layer", include_lm_head=True)[0]
    assert head.prefixes == ("transformer.wte",)


def test_the_final_norm_is_not_part_of_the_head() -> None:
    blocks = partition_parameters(infos("llama", tie_word_embeddings=False), "layer", include_lm_head=True)
    assert not any(belongs("model.norm.weight", block.prefixes) for block in blocks)


@pytest.mark.parametrize(
    ("parameters", "options", "words"),
    [
        ([ParameterInfo("fc.weight", (4, 4))], {}, "No repeated layers"),
        ([ParameterInfo(f"layers.{n}.fc.weight", (4, 4)) for n in range(2)], {"include_embedding": True}, "embedding"),
        ([ParameterInfo(f"layers.{n}.fc.weight", (4, 4)) for n in range(2)], {"include_lm_head": True}, "output"),
    ],
)
def test_what_does_not_exist_is_an_error_that_says_what_to_do(
    parameters: list[ParameterInfo], options: dict[str, bool], words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        partition_parameters(parameters, "layer", **options)
    assert caught.value.advice


def test_an_unknown_strategy_is_an_error() -> None:
    with pytest.raises(InputError, match="rows"):
        partition_parameters([], "rows")  # type: ignore[arg-type]


COMPONENT = st.text("abcdefgh_0123456789", min_size=1, max_size=5)
NAME = st.lists(COMPONENT, min_size=1, max_size=5).map(".".join)


@given(NAME, NAME)
def test_belonging_is_a_matter_of_whole_components(name: str, prefix: str) -> None:
    parts, wanted = name.split("."), prefix.split(".")
    assert belongs(name, [prefix]) == belongs(name, [prefix + "."]) == (parts[: len(wanted)] == wanted)


def test_layer_1_is_not_layer_11() -> None:
    assert belongs("layers.1.weight", ["layers.1."])
    assert not belongs("layers.11.weight", ["layers.1"])
    assert not belongs("my_layers.1.weight", ["layers.1"])


@given(
    layers=st.integers(1, 4),
    shapes=st.lists(st.sampled_from([(3,), (4, 2), (2, 3, 2)]), min_size=4, max_size=6),
    strategy=st.sampled_from(STRATEGIES),
)
def test_partitions_cover_any_stack_exactly_once(layers: int, shapes: list[tuple[int, ...]], strategy: Any) -> None:
    children = ["self_attn.q", "self_attn.o", "mlp.up", "mlp.down", "norm_a", "norm_b"]
    parameters = [
        ParameterInfo(f"net.body.{layer}.{child}.weight", shape)
        for layer in range(layers)
        for child, shape in zip(children, shapes, strict=False)
    ]
    blocks = partition_parameters(parameters, strategy)
    assert all(len(owners(parameter, blocks)) == 1 for parameter in parameters)
    assert sum(block.parameters for block in blocks) == sum(parameter.numel for parameter in parameters)


@given(
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    columns=st.integers(1, 5),
    limit=st.integers(1, 300),
)
def test_splitting_by_rows_trains_every_row_once(rows: list[int], columns: int, limit: int) -> None:
    parameters = [ParameterInfo(f"head.{n}.weight", (count, columns)) for n, count in enumerate(rows)]
    parameters.append(ParameterInfo("head.norm.weight", (7,)))
    whole = Block("head", ("head",), sum(parameter.numel for parameter in parameters))
    pieces = split_by_rows(whole, parameters, limit)
    assert sum(piece.parameters for piece in pieces) == whole.parameters
    for parameter in parameters:
        trained = [rows_of(parameter.name, p.prefixes) for p in pieces if belongs(parameter.name, p.prefixes)]
        covered = [row for first_end in trained for row in range(*(first_end or (0, parameter.shape[0])))]
        assert sorted(covered) == list(range(parameter.shape[0]))


def test_a_block_within_the_limit_is_not_split() -> None:
    block = Block("head", ("head",), 10)
    assert split_by_rows(block, [ParameterInfo("head.weight", (5, 2))], 10) == (block,)


def test_the_partition_needs_no_torch() -> None:
    code = "import badam.blocks.partition, badam.blocks.schedule, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

"""Models with an encoder and a decoder, and classifiers of images: composed, exact and measured, the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from badam import BlockOptimizer
from badam.errors import InputError
from badam.plan import Target
from badam.training.build import build_model, model_config
from badam.training.losses import forward_loss
from badam.training.options import RunOptions
from badam.training.run import run_plan
from badam.training.tasks import blank_batch, chosen_lengths, default_task
from badam.vocabulary import Strategy
from badam_planner.rehearsal.evaluator import Evaluator
from badam_planner.rehearsal.rehearse import fake_world
from badam_planner.search.planner import Request
from badam_planner.search.request import check_engine
from badam_planner.search.size_map import map_sizes
from tests.badam_planner.rehearsal.measuring import measure, products_take_known_scratch
from tests.badam_planner.rehearsal.plans import BART, FLAN_T5, LLAMA, T5, VIT, WHISPER, plan_of, spec_of
from tests.badam_planner.rehearsal.test_evaluator import everything_in

SIZES: dict[str, dict[str, Any]] = {
    "t5": {"seq_len": 24, "decoder_len": 10},
    "flan-t5": {"seq_len": 24, "decoder_len": 10},
    "bart": {"seq_len": 24, "decoder_len": 10},
    "whisper": {"seq_len": None},
    # In bf16 oneDNN's kernels take scratch of their own for these odd sizes; torch's for fp32 take none.
    "vit": {"seq_len": None, "batch_size": 8, "dtype": "float32"},
}
CONFIGS = {"t5": T5, "flan-t5": FLAN_T5, "bart": BART, "whisper": WHISPER, "vit": VIT}
SCALAR_BYTES = 8
"""Not predicted: host memory for each Python number that multiplies a tensor inside autograd's reach."""
MOST_SCALARS = {"t5": 1, "flan-t5": 24, "bart": 0, "whisper": 16, "vit": 0}


@products_take_known_scratch
@pytest.mark.parametrize("checkpointing", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize(
    ("name", "strategy"),
    [(name, "layer") for name in CONFIGS] + [("t5", "attn-mlp"), ("whisper", "attn-mlp")],
)
def test_predicted_and_measured_are_the_same_bytes(name: str, strategy: Strategy, checkpointing: bool) -> None:
    plan, tree = plan_of(CONFIGS[name], 3, strategy=strategy, checkpointing=checkpointing, **SIZES[name])
    forecast = Evaluator(tree).worst_block(plan)
    more = measure(plan, forecast.worst_block).peak_bytes - forecast.worst.peak_allocated_bytes
    assert more in range(0, (MOST_SCALARS[name] + 1) * SCALAR_BYTES, SCALAR_BYTES)


@pytest.mark.parametrize(("name", "checkpointing"), [("t5", False), ("whisper", True), ("vit", False)])
def test_deep_stacks_are_composed_from_few_layers_event_by_event(
    name: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, tree = plan_of(CONFIGS[name], 7, checkpointing=checkpointing, **SIZES[name])
    blocks = {1, len(plan.partition.blocks) - 2}
    full = {block: everything_in(Evaluator(tree, exact=True).recording(plan, block)) for block in blocks}
    monkeypatch.setattr(Evaluator, "_at_full_depth", None)  # composing is possible
    for block in blocks:
        assert everything_in(Evaluator(tree).recording(plan, block)) == full[block]


def test_the_first_blocks_of_a_model_with_two_stacks_are_those_of_the_encoder() -> None:
    plan, _ = plan_of(T5, 2, include_embedding=True, include_lm_head=False)
    names = [block.name for block in plan.partition.blocks]
    assert names == ["embedding", "encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]
    with fake_world():
        model = build_model(plan.model, plan.training)
        found = BlockOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            list(model.named_parameters()),
            include_embedding=True,
        )
    assert [list(prefixes) for prefixes in found.block_prefix_list] == [
        list(block.prefixes) for block in plan.partition.blocks
    ]
    counted = sum(block.parameters for block in plan.partition.blocks)
    norms = 2 * T5["d_model"]
    assert counted + norms == sum(parameter.numel() for parameter in model.parameters())  # tied embeddings are one


def test_position_biases_belong_to_the_first_layer_of_each_stack() -> None:
    plan, _ = plan_of(T5, 3)
    sizes = {block.name: block.parameters for block in plan.partition.blocks}
    bias = 32 * T5["num_heads"]
    assert sizes["encoder.block.0"] - sizes["encoder.block.1"] == bias
    assert sizes["decoder.block.0"] - sizes["decoder.block.2"] == bias


def test_a_head_of_its_own_counts_though_transformers_would_tie_it() -> None:
    entries = {}
    for name in ("t5", "flan-t5"):
        with fake_world():
            plan, _ = plan_of(CONFIGS[name], 2)
            model = build_model(plan.model, plan.training)
            entries[name] = model.lm_head.weight is model.shared.weight
    assert entries == {"t5": True, "flan-t5": False}


def test_what_is_never_trained_is_in_no_block() -> None:
    plan, tree = plan_of(WHISPER, 2, seq_len=None, include_embedding=True)
    assert not any("encoder.embed_positions" in info.name for info in tree.parameters)
    assert not any("encoder.embed_positions" in path for block in plan.partition.blocks for path in block.prefixes)


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"model_type": "t5", "architectures": ["T5WithLMHeadModel"]}, "sequence-to-sequence"),
        ({"model_type": "t5"}, "sequence-to-sequence"),
        ({"model_type": "bart", "architectures": ["BartModel"], "is_encoder_decoder": True}, "sequence-to-sequence"),
        ({"model_type": "bart", "architectures": ["BartForCausalLM"]}, "causal-lm"),
        ({"model_type": "whisper"}, "speech-to-text"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "image-classification"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "causal-lm"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "sequence-classification"),
        ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, "causal-lm"),
    ],
)  # fmt: skip
def test_the_task_follows_from_the_configuration(config: dict[str, Any], task: str) -> None:
    assert default_task(config) == task


def test_lengths_are_what_the_model_lets_one_choose() -> None:
    def lengths(config: dict[str, Any], *asked: int | None) -> tuple[int, int | None]:
        spec = spec_of(config, 2)
        return chosen_lengths(spec, model_config(spec), *asked)

    assert lengths(LLAMA, None, None) == (512, None)
    assert lengths(T5, None, None) == (512, 512)
    assert lengths(T5, 100, 20) == (100, 20)
    assert lengths(WHISPER, None, None) == (20, 12)
    assert lengths(WHISPER, 20, 5) == (20, 5)
    assert lengths(VIT, None, None) == (10, None)
    with pytest.raises(InputError, match="takes inputs of 10 positions, so --seq-len 11 is not possible"):
        lengths(VIT, 11, None)
    with pytest.raises(InputError, match="has no decoder with a length of its own"):
        lengths(LLAMA, None, 7)


def test_a_text_longer_than_the_decoder_can_write_is_refused() -> None:
    plan, tree = plan_of(WHISPER, 2, seq_len=None, decoder_len=13)
    with pytest.raises(InputError, match="positions for 12 tokens, the plan is for 13") as caught:
        Evaluator(tree).recording(plan, 0)
    assert "--decoder-len 12" in str(caught.value.advice)


def test_batches_have_the_shapes_of_the_task() -> None:
    shapes = {}
    for name in ("t5", "whisper", "vit"):
        plan, _ = plan_of(CONFIGS[name], 2, **{**SIZES[name], "batch_size": 3})
        batch = blank_batch(plan, model_config(plan.model))
        shapes[name] = {key: tuple(tensor.shape) for key, tensor in batch.items()}
    assert shapes == {
        "t5": {"input_ids": (3, 24), "attention_mask": (3, 24), "labels": (3, 10)},
        "whisper": {"input_features": (3, 8, 40), "labels": (3, 12)},
        "vit": {"pixel_values": (3, 3, 21, 21), "labels": (3,)},
    }


def test_only_the_batch_varies_where_the_model_fixes_the_length() -> None:
    plan, tree = plan_of(VIT, 2, seq_len=None, batch_size=4)
    assert {cell.seq_len for cell in map_sizes(plan, Evaluator(tree)).cells} == {10}


def test_losses_that_such_a_model_lacks_and_several_cards_are_refused() -> None:
    plan, tree = plan_of(T5, 2, loss="chunked")
    with pytest.raises(InputError, match="needs a causal language model"):
        Evaluator(tree).recording(plan, 0)
    cards = Target(gpu="rtx3090", engine="fsdp2", num_gpus=2, total_bytes=2**34, usable_bytes=2**34)
    with pytest.raises(InputError, match="speech-to-text can be planned for one card only"):
        check_engine(Request(spec=spec_of(WHISPER, 2), target=cards))


def test_micro_batches_of_different_length_weigh_as_one_batch() -> None:
    plan, _ = plan_of(T5, 1, seq_len=6, decoder_len=5, dtype="float32")
    torch.manual_seed(0)
    model = build_model(plan.model, plan.training)
    batch = {name: tensor.random_(0, 96) for name, tensor in blank_batch(plan, model.config).items()}
    batch["attention_mask"].fill_(1)
    batch["labels"][1, 2:] = -100
    whole = forward_loss(model, batch, "full")
    halves = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(2)]
    parts = [forward_loss(model, half, "full", num_items=torch.tensor(7)) for half in halves]
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_badam_train_says_what_to_use_for_tasks_that_it_has_no_data_for(tmp_path: Path) -> None:
    plan, _ = plan_of(WHISPER, 2, seq_len=None)
    with pytest.raises(InputError, match="this plan is for speech-to-text") as caught:
        run_plan(plan, RunOptions(output_dir=tmp_path / "run"), Console(stderr=True))
    assert "badam.profiling.record" in str(caught.value.advice)
    assert not (tmp_path / "run").exists()


def test_position_biases_are_trained_without_attention_weights_on_a_card_only() -> None:
    operations = {}
    for gpu in ("cpu", "card"):
        target = Target(gpu=gpu, total_bytes=2**40, usable_bytes=2**40)
        plan, tree = plan_of(T5, 2, target=target, **SIZES["t5"])
        operations[gpu] = {
            one.operation.removeprefix("aten.").split(".")[0] for one in Evaluator(tree).recording(plan, 0).allocations
        }
    assert "_safe_softmax" in operations["cpu"]
    assert "_safe_softmax" not in operations["card"]
    assert "_scaled_dot_product_efficient_attention_backward" in operations["card"]

"""Every kind of model: composed, rehearsed at full depth and measured on the CPU, the same bytes."""

from __future__ import annotations

from typing import Any

import pytest

from badam.errors import InputError
from badam.vocabulary import Dtype
from badam_planner.rehearsal.evaluator import Evaluator
from badam_planner.search.model_spec import specify
from tests.badam_planner.rehearsal.measuring import measure
from tests.badam_planner.rehearsal.plans import DEBERTA, MODERNBERT, plan_of

SCALARS_BYTES = 128
"""Not predicted: 8 bytes of host memory for each Python number that multiplies a tensor inside autograd's reach."""

SMALL: dict[str, Any] = {"vocab_size": 768, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3_text": {**GROUPED, "sliding_window": 16},
    "phi": SMALL,
    "phi3": {**GROUPED, "pad_token_id": 0},
    "qwen2": {**SMALL, "num_key_value_heads": 2},
    "qwen3": GROUPED,
    "granite": {**SMALL, "num_key_value_heads": 2},
    "olmo2": {**SMALL, "num_key_value_heads": 2},
    "glm4": {**GROUPED, "pad_token_id": 0},
    "gpt_neox": SMALL,
    "opt": {
        "vocab_size": 768, "hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": 32,
        "max_position_embeddings": 64, "dropout": 0.0,
    },
    "falcon": {"vocab_size": 768, "hidden_size": 32, "num_attention_heads": 4},
    "bloom": {"vocab_size": 768, "hidden_size": 32, "n_head": 4},
    "biogpt": {
        **SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "layerdrop": 0.0,
        "max_position_embeddings": 64,
    },
    "mixtral": {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4},
    "qwen3_moe": {**GROUPED, **EXPERTS, "num_experts": 4},
    "gpt_oss": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    "deepseek_v3": {
        **SMALL, **EXPERTS, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "mamba": {"vocab_size": 768, "hidden_size": 32, "state_size": 4},
    "jamba": {**SMALL, "num_key_value_heads": 2, "use_mamba_kernels": False, "mamba_d_state": 4},
    "qwen3_next": {**GROUPED, **EXPERTS, **LINEAR, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": {**GROUPED, **LINEAR},
}  # fmt: skip

SEES_IMAGES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", **GROUPED},
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
    },
    "llava": {
        "text_config": {"model_type": "llama", **SMALL},
        "vision_config": {"model_type": "clip_vision_model", **VISION},
    },
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_composed_exact_and_measured_are_the_same_bytes(model_type: str, checkpointing: bool) -> None:
    config = {"model_type": model_type, "architectures": ["SomeForCausalLM"], **CONFIGS[model_type]}
    plan, tree = plan_of(config, 4, checkpointing=checkpointing, seq_len=24)
    known = Evaluator(tree).worst_block(plan)
    exact = Evaluator(tree, exact=True).peaks(plan, known.worst_block)
    assert known.worst.peak_allocated_bytes == exact.peak_allocated_bytes
    measured = measure(plan, known.worst_block).peak_bytes
    assert 0 <= measured - exact.peak_allocated_bytes <= SCALARS_BYTES


@pytest.mark.parametrize("checkpointing", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize(
    ("config", "dtype"),
    [(DEBERTA, "float32"), (DEBERTA, "bfloat16"), (MODERNBERT, "float32")],
    ids=["deberta-v3-fp32", "deberta-v3-bf16", "modernbert-fp32"],
)
def test_encoders_are_predicted_to_the_byte_where_products_take_no_scratch(
    config: dict[str, Any], dtype: Dtype, checkpointing: bool
) -> None:
    """In bf16 oneDNN may pack matrices for a product; the peak of this DeBERTa is elsewhere."""
    config = {**config, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    plan, tree = plan_of(config, 4, checkpointing=checkpointing, dtype=dtype)
    known = Evaluator(tree).worst_block(plan)
    assert measure(plan, known.worst_block).peak_bytes == known.worst.peak_allocated_bytes


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("config", [DEBERTA, MODERNBERT], ids=["deberta-v3", "modernbert"])
def test_encoders_of_some_width_are_predicted_to_the_byte_in_bf16(config: dict[str, Any], checkpointing: bool) -> None:
    wide = {
        "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8, "max_position_embeddings": 512,
        "vocab_size": 8192, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    plan, tree = plan_of({**config, **wide}, 4, checkpointing=checkpointing, batch_size=4, seq_len=256)
    known = Evaluator(tree).worst_block(plan)
    assert measure(plan, known.worst_block).peak_bytes == known.worst.peak_allocated_bytes


@pytest.mark.parametrize("model_type", SEES_IMAGES)
def test_of_a_model_that_also_sees_images_the_text_part_is_trained(model_type: str) -> None:
    config = {"model_type": model_type, "architectures": ["SomeForConditionalGeneration"], **SEES_IMAGES[model_type]}
    config["text_config"] = {**config["text_config"], "num_hidden_layers": 3}
    plan, tree = plan_of(config, 3, seq_len=24)
    assert len(plan.partition.blocks) == 3
    assert all("language_model" in prefix for block in plan.partition.blocks for prefix in block.prefixes)
    predicted = Evaluator(tree).worst_block(plan)
    measured = measure(plan, predicted.worst_block).peak_bytes
    assert 0 <= measured - predicted.worst.peak_allocated_bytes <= SCALARS_BYTES


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("t5", "T5ForSequenceClassification"),
        ("speecht5", "SpeechT5ForSpeechToText"),
        ("resnet", "ResNetForImageClassification"),
    ],
)
def test_models_for_other_tasks_are_refused_by_name(model_type: str, architecture: str) -> None:
    config = {"model_type": model_type, "architectures": [architecture]}
    with pytest.raises(InputError, match=f"is a {architecture}, which cannot be planned") as caught:
        specify("acme/model", "config", config)
    assert "next token" in str(caught.value.advice)

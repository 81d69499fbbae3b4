"""Tiny plans for rehearsals, built without files."""

from __future__ import annotations

from typing import Any

from badam.plan import MethodOptions, ModelSpec, Plan, Target, config_digest
from badam.training.build import choose_attention, model_config
from badam.training.tasks import chosen_lengths, default_task
from badam.vocabulary import Dtype, Loss, Method, Strategy
from badam_planner.rehearsal.model_tree import ModelTree, inspect_model
from badam_planner.search.planner import Request, staged_plan
from badam_planner.search.settings import MemorySetting

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 768, "hidden_size": 32,
    "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 768, "n_embd": 32, "n_head": 4,
    "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GEMMA2: dict[str, Any] = {
    "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "vocab_size": 96, "hidden_size": 32,
    "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16,
}  # fmt: skip
QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 768, "hidden_size": 32,
    "intermediate_size": 48, "moe_intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
BERT: dict[str, Any] = {
    "model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 96, "hidden_size": 32,
    "intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip

ROBERTA: dict[str, Any] = {**BERT, "model_type": "roberta", "architectures": ["RobertaForSequenceClassification"]}
DEBERTA: dict[str, Any] = {
    "model_type": "deberta-v2", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "max_position_embeddings": 64, "type_vocab_size": 0, "relative_attention": True, "position_buckets": 16,
    "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
}  # fmt: skip

MODERNBERT: dict[str, Any] = {
    "model_type": "modernbert", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "max_position_embeddings": 64, "local_attention": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
T5: dict[str, Any] = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 768, "d_model": 32, "d_kv": 8,
    "d_ff": 48, "num_heads": 4, "dropout_rate": 0.0, "is_encoder_decoder": True, "decoder_start_token_id": 0,
}  # fmt: skip
FLAN_T5: dict[str, Any] = {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
BART: dict[str, Any] = {
    "model_type": "bart", "architectures": ["BartForConditionalGeneration"], "vocab_size": 768, "d_model": 32,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "max_position_embeddings": 64, "dropout": 0.0, "is_encoder_decoder": True, "decoder_start_token_id": 0,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
WHISPER: dict[str, Any] = {
    "model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], "vocab_size": 768, "d_model": 32,
    "num_mel_bins": 8, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_source_positions": 20, "max_target_positions": 12, "is_encoder_decoder": True,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 1, "dropout": 0.0,
}  # fmt: skip
VIT: dict[str, Any] = {
    "model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": 32, "intermediate_size": 48,
    "num_attention_heads": 4, "image_size": 21, "patch_size": 7, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip

DEPTH_FIELDS = {
    "gpt2": ("n_layer",), "t5": ("num_layers", "num_decoder_layers"), "whisper": ("encoder_layers", "decoder_layers"),
    "bart": ("encoder_layers", "decoder_layers"),
}  # fmt: skip
CPU = Target(gpu="cpu", total_bytes=2**40, usable_bytes=2**40)


def spec_of(config: dict[str, Any], depth: int) -> ModelSpec:
    """``config`` with ``depth`` layers, in each stack where there are two."""
    fields = DEPTH_FIELDS.get(config["model_type"], ("num_hidden_layers",))
    facts = {**config, **dict.fromkeys(fields, depth)}
    return ModelSpec(
        id=config["model_type"],
        source="config",
        config=facts,
        config_digest=config_digest(facts),
        task=default_task(facts),
        parameters=1,
    )


def plan_of(
    config: dict[str, Any],
    depth: int,
    *,
    strategy: Strategy = "layer",
    checkpointing: bool = False,
    loss: Loss = "full",
    batch_size: int = 2,
    seq_len: int | None = 24,
    decoder_len: int | None = None,
    grad_accum: int = 1,
    dtype: Dtype = "bfloat16",
    target: Target = CPU,
    include_embedding: bool = False,
    include_lm_head: bool = False,
    active_modules: tuple[str, ...] = (),
    method: Method = "badam",
    options: MethodOptions | None = None,
    learning_rate: float = 1e-5,
) -> tuple[Plan, ModelTree]:
    """A plan and the module tree that it is for."""
    spec = spec_of(config, depth)
    attention = choose_attention(spec)
    tree = inspect_model(spec, attention)
    length, target_length = chosen_lengths(spec, model_config(spec), seq_len, decoder_len)
    request = Request(
        spec=spec,
        target=target,
        batch_size=batch_size,
        seq_len=length,
        decoder_len=target_length,
        grad_accum=grad_accum,
        dtype=dtype,
        attention=attention,
        include_embedding=include_embedding,
        include_lm_head=include_lm_head,
        active_modules=active_modules,
        method=method,
        options=options or MethodOptions(),
        learning_rate=learning_rate,
    )
    return staged_plan(request, strategy, MemorySetting("all" if checkpointing else "none", loss), tree), tree

"""The default configuration of any language model in transformers, made tiny by the names of its fields."""

from __future__ import annotations

from typing import Any

LAYERS, VOCABULARY = 4, 768

_FIELDS: dict[int, str] = {
    64: "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim mamba_d_ssm",
    128: "intermediate_size ffn_dim d_ff n_inner ffn_hidden_size inner_dim shared_expert_intermediate_size "
    "dense_intermediate_size mlp_hidden_size expert_ffn_hidden_size max_position_embeddings n_positions max_seq_len "
    "max_seq_length n_ctx context_length dim_ff dff",
    LAYERS: "num_hidden_layers n_layer n_layers num_layers num_attention_heads n_head n_heads num_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts num_routed_experts",
    2: "num_key_value_heads n_head_kv num_kv_heads num_experts_per_tok top_k moe_topk num_experts_per_token moe_k "
    "swa_num_key_value_heads num_global_key_value_heads",
    16: "head_dim dim_head v_head_dim sliding_window moe_intermediate_size q_lora_rank kv_lora_rank state_size "
    "attention_head_size mamba_d_state mamba_d_head swa_head_dim mamba_head_dim ssm_state_size global_head_dim "
    "expert_intermediate_size local_attention qk_head_dim index_head_dim linear_key_head_dim linear_value_head_dim",
    8: "qk_rope_head_dim qk_nope_head_dim",
    VOCABULARY: "vocab_size",
    1: "first_k_dense_replace n_group topk_group n_shared_experts num_nextn_predict_layers mamba_n_groups n_groups",
}
_MOST = {name: most for most, names in _FIELDS.items() for name in names.split()}

_LATENT_ATTENTION = {"head_dim": 8, "num_key_value_heads": 4}
_MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "youtu"), _LATENT_ATTENTION),
    **dict.fromkeys(("bamba", "granitemoehybrid"), _MAMBA_HEADS),
    **{name: {"rotary_dim": 8} for name in ("codegen", "gptj")},
    **{name: {"head_dim": 16} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral", "nemotron")},
    "deepseek_v2": {**_LATENT_ATTENTION, "num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
}
"""What does not follow from the names of fields, since two of them must agree."""


def tiny(model_type: str, default: dict[str, Any], architecture: str) -> dict[str, Any]:
    """A configuration with four layers of 64 channels and no dropout, as far as the names of its fields are known.

    Args:
        model_type: in transformers.
        default: the model's own default configuration.
        architecture: class to build.
    """
    return {**_shrunk(default), "model_type": model_type, "architectures": [architecture], **OWN.get(model_type, {})}


def _shrunk(config: dict[str, Any]) -> dict[str, Any]:
    layers = next((config[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if config.get(name)), None)
    found = {}
    for name, value in config.items():
        if name in ("dtype", "transformers_version", "_name_or_path", "per_layer_config"):
            continue
        if isinstance(value, dict) and "model_type" in value:
            value = _shrunk(value)
        elif isinstance(value, list) and len(value) > LAYERS and len(value) == layers:
            value = _of_each_kind(value, _MOST.get(name))
        elif isinstance(value, float) and ("dropout" in name or name.endswith(("_drop", "pdrop"))):
            value = 0.0
        elif type(value) is int:
            most = 0 if name.endswith("_token_id") and value >= VOCABULARY else _MOST.get(name, value)
            value = min(value, most)
        found[name] = value
    return found


def _of_each_kind(by_layer: list[Any], most: int | None) -> list[Any]:
    """Four entries of a list with one for each layer: of words every kind, in turn."""
    if most is not None:
        return [most] * LAYERS
    if isinstance(by_layer[0], str):
        kinds = list(dict.fromkeys(by_layer))
        return [kinds[layer % len(kinds)] for layer in range(LAYERS)]
    return by_layer[:LAYERS]

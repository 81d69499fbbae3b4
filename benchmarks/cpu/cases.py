"""What is planned, trained and compared: small models of many architectures, every method but qlora."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

VOCABULARY, HIDDEN, HEADS, LAYERS, POSITIONS = 2048, 128, 4, 3, 256
INTERMEDIATE = 2 * HIDDEN

_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA_LIKE = {
    **_COMMON, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS,
}  # fmt: skip
_NEOX_LIKE = {
    **_COMMON, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "max_position_embeddings": POSITIONS, "hidden_dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **_LLAMA_LIKE},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], **_LLAMA_LIKE},
    "qwen2": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **_LLAMA_LIKE, "tie_word_embeddings": True,
    },
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **_LLAMA_LIKE, "head_dim": 32},
    "gemma2": {
        "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], **_LLAMA_LIKE, "head_dim": 32,
        "sliding_window": 64, "query_pre_attn_scalar": 32,
    },
    "phi3": {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], **_LLAMA_LIKE},
    "gpt2": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **_COMMON, "n_embd": HIDDEN, "n_head": HEADS,
        "n_layer": LAYERS, "n_positions": POSITIONS, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "gpt_neox": {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], **_NEOX_LIKE},
    "opt": {
        "model_type": "opt", "architectures": ["OPTForCausalLM"], **_COMMON, "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN, "ffn_dim": INTERMEDIATE, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "max_position_embeddings": POSITIONS, "dropout": 0.0, "attention_dropout": 0.0,
    },
    "falcon": {
        "model_type": "falcon", "architectures": ["FalconForCausalLM"], **_COMMON, "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    },
    "bloom": {
        "model_type": "bloom", "architectures": ["BloomForCausalLM"], **_COMMON, "hidden_size": HIDDEN,
        "n_layer": LAYERS, "n_head": HEADS, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], **_LLAMA_LIKE, "head_dim": 32,
        "moe_intermediate_size": HIDDEN, "num_experts": 4, "num_experts_per_tok": 2,
    },
}  # fmt: skip
"""One configuration per family of transformers, without dropout, which would need random masks."""

BATCH = 2
LENGTHS = (64, 128)
VISIT = 2

STEPS = {
    "badam": VISIT * LAYERS, "badam-ratio": 2 * VISIT, "adam": 3, "lora": 3, "lomo": 3, "adalomo": 3, "galore": 3,
    "lisa": 8 * VISIT, "hift": 3 * LAYERS, "mezo": 3,
}  # fmt: skip
"""By method: optimizer steps until whatever the method keeps has been made and every block has been visited."""


@dataclass(frozen=True, slots=True)
class Case:
    """One run; ``name`` is unique."""

    architecture: str
    method: str
    checkpointing: str
    seq_len: int
    partition: str = ""
    loss: str = "full"

    @property
    def name(self) -> str:
        parts = (self.architecture, self.method, self.partition, self.checkpointing, self.loss, str(self.seq_len))
        return "-".join(part for part in parts if part)

    @property
    def plan_options(self) -> list[str]:
        """Options of badam-plan beside the model."""
        options = [
            "--gpu", "cpu", "--method", self.method, "--batch-size", BATCH, "--seq-len", self.seq_len,
            "--checkpointing", self.checkpointing, "--loss", self.loss, "--learning-rate", "1e-4",
        ]  # fmt: skip
        if self.method != "hift":  # which goes on to the next block in every step
            options += ["--switch-every", VISIT]
        if self.method in ("badam", "hift"):
            options += ["--partition", self.partition or "layer"]
        return list(map(str, options))

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        blocks = {"attn-mlp": 2, "matrix": 7}.get(self.partition, 1)
        return STEPS[self.method] * blocks


def all_cases() -> Iterator[Case]:
    """Every case, those first that differ most from each other, so that a run that is stopped has seen all kinds."""
    short, long = LENGTHS
    settings = (("all", short), ("none", long), ("all", long), ("none", short))
    for (checkpointing, length), method, architecture in itertools.product(settings, STEPS, ARCHITECTURES):
        yield Case(architecture, method, checkpointing, length)
    for partition, loss in itertools.product(("attn-mlp", "matrix"), ("full", "chunked")):
        yield Case("llama", "badam", "all", LENGTHS[0], partition, loss)

"""Who takes part, with which model, on how many tokens: everything that is fixed before the first run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from badam.plan import MethodOptions, Plan, Target
from badam.vocabulary import Method, Strategy
from badam_planner.rehearsal.model_tree import ModelTree, inspect_model
from badam_planner.search.model_spec import specify
from badam_planner.search.planner import Request, staged_plan
from badam_planner.search.settings import MemorySetting

VOCABULARY = 4096
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": 320,
    "intermediate_size": 880,
    "num_hidden_layers": 6,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True, slots=True)
class Settings:
    """The sizes of the contest, equal for all."""

    batch_size: int = 4
    seq_len: int = 64
    steps: int = 96
    evaluate_every: int = 24
    evaluation_batches: int = 16
    pretraining_steps: int = 1200
    pretraining_batch: int = 4
    pretraining_length: int = 128
    pretraining_rate: float = 2e-3
    scheduler: str = "cosine"
    seeds: tuple[int, ...] = (0, 1, 2)
    training_pairs: int | None = None  # fine-tune on so many pairs drawn once; None means all

    @property
    def digest(self) -> str:
        """Tells records of these settings from those of others."""
        return _digest(asdict(self))

    @property
    def base_digest(self) -> str:
        """Tells the weights that fine-tuning begins with from others: of what pretraining depends on."""
        return _digest({name: value for name, value in asdict(self).items() if name.startswith("pretraining_")})


def _digest(facts: Mapping[str, Any]) -> str:
    """``facts`` that are None are left out: a new one of those changes no digest."""
    stated = {name: value for name, value in facts.items() if value is not None}
    return hashlib.sha256(json.dumps([stated, CONFIG], sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Contestant:
    """A method with the options that it runs with.

    ``rate`` is the learning rate that is tried first; see benchmarks.learning.rates.
    """

    name: str
    method: Method
    rate: float
    cut: Strategy = "full"
    switch_every: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


# Blocks include embedding and output projection, which in a model this small are a quarter of the parameters. Visits
# are so short because there are 96 steps: two passes over 8 layers, over 14 halves, over 8 windows of the ratio, and
# one over 44 matrices.
CONTESTANTS = (
    Contestant("adam", "adam", 1e-3),
    Contestant("badam, layers", "badam", 1e-3, "layer", 6),
    Contestant("badam, attn-mlp", "badam", 1e-3, "attn-mlp", 3),
    Contestant("badam, matrices", "badam", 1e-3, "matrix", 2),
    Contestant("badam-ratio", "badam-ratio", 1e-3, "ratio", 6, {"update_ratio": 0.125}),
    Contestant("lora", "lora", 1e-3, options={"rank": 8}),
    Contestant("galore", "galore", 1e-3, options={"rank": 32, "projection_gap": 40}),
    Contestant("lisa", "lisa", 1e-3, "layer", 6, {"sampled_layers": 2}),
    Contestant("hift", "hift", 1e-3, "layer", 1),
    Contestant("lomo", "lomo", 1e-1),
    Contestant("adalomo", "adalomo", 1e-2),
    Contestant("mezo", "mezo", 1e-4),
)

LONGER_CONTESTANTS = (
    Contestant("adam", "adam", 1e-3),
    Contestant("badam, layers", "badam", 1e-3, "layer", 24),
    Contestant("lora", "lora", 1e-3, options={"rank": 8}),
    Contestant("lomo", "lomo", 1e-1),
)
"""Who also runs four times as long, at the rate that was best in the contest, with visits four times as long."""


def longer_settings() -> Settings:
    """Four times the steps, one seed."""
    return Settings(steps=384, evaluate_every=96, seeds=(0,))


EPOCHS_RATES = 3
EPOCHS_FIRST_RATES = (0, -1)
"""Positions around the contest's best rate (benchmarks.learning.rates); longer runs rather want a smaller one."""

EPOCHS_CONTESTANTS = (
    Contestant("badam, layers", "badam", 3.2e-3, "layer", 50),
    Contestant("adam", "adam", 3.2e-4),
    Contestant("lora", "lora", 3.2e-3, options={"rank": 8}),
    Contestant("lomo", "lomo", 3.2e-1),
)
"""Who runs for three epochs, in the order of the runs; the rate is the one that was best in the contest."""


def epochs_settings() -> Settings:
    """The proportions of the paper's runs on Alpaca-GPT4: three epochs, in each one visit of K steps to every block.

    With 8 blocks, batches of 4 and 1600 pairs K = n / (B D) is 50. The model that is fine-tuned has been trained twice
    as long as in the contest.
    """
    return Settings(steps=1200, evaluate_every=100, seeds=(0,), training_pairs=1600, pretraining_steps=2400)


ADAM_OF_FEW_UPDATES = Contestant("adam", "adam", 3.2e-4)
FEW_UPDATES_RATES = (3.2e-4, 1e-3)


def few_updates_settings() -> Settings:
    """As many steps for Adam as BAdam gives to each block in three epochs: an eighth."""
    return replace(epochs_settings(), steps=150, evaluate_every=50)


def plan_of(contestant: Contestant, settings: Settings, rate: float, seed: int) -> Plan:
    """The plan of one run, without a prediction."""
    tree = _tree()
    request = Request(
        spec=specify("badam/convergence", "config", CONFIG),
        target=Target(gpu="cpu", total_bytes=0, usable_bytes=0),
        method=contestant.method,
        include_embedding=contestant.method != "lisa",  # always trained there
        include_lm_head=contestant.method != "lisa",
        batch_size=settings.batch_size,
        seq_len=settings.seq_len,
        switch_every=contestant.switch_every,
        learning_rate=rate,
        options=MethodOptions(**contestant.options),
        seed=seed,
    )
    return staged_plan(request, contestant.cut, MemorySetting("none", "full"), tree)


def _tree() -> ModelTree:
    return inspect_model(specify("badam/convergence", "config", CONFIG), "sdpa")

"""Every method through a whole run: it trains, saves, resumes to the bit, and leaves a model that anyone can load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from badam.plan import BlockPlan, MethodOptions, Partition, Plan
from badam.training.methods import method_of
from badam.training.methods.lisa import LisaOptimizer
from badam.training.methods.mezo import MezoOptimizer
from tests.badam.training.tiny import run_tiny, tiny_plan

EVERYTHING = Partition(strategy="full", blocks=(BlockPlan(name="all", prefixes=("model", "lm_head"), parameters=1),))
RATES = {"adam": 1e-3, "badam-ratio": 1e-3, "lora": 1e-2, "lomo": 1e-1, "adalomo": 1e-2, "galore": 1e-3, "mezo": 1e-4}
BY_BLOCKS = ("lisa", "hift")


def plan_for(method: str, **optimizer: Any) -> Plan:
    for module in method_of(method).libraries:
        pytest.importorskip(module)
    learning_rate = RATES.get(method, 1e-3)
    unclipped = {"max_grad_norm": 0.0} if method in ("lomo", "adalomo", "mezo") else {}
    return tiny_plan(
        method=method,
        training={"options": MethodOptions(rank=4, update_ratio=0.3)},
        optimizer={"learning_rate": learning_rate, **unclipped, **optimizer},
        schedule={"switch_every": 1 if method == "hift" else 3},
        **({} if method in BY_BLOCKS else {"partition": EVERYTHING}),
    )


def losses(directory: Path) -> list[float]:
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("method", [*RATES, *BY_BLOCKS])
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(method: str, tmp_path: Path) -> None:
    plan = plan_for(method)
    whole, _ = run_tiny(plan, tmp_path, output="whole", max_steps=5, save_steps=2, lr_scheduler="constant")
    run_tiny(plan, tmp_path, output="parts", max_steps=2, save_steps=2, lr_scheduler="constant")
    run_tiny(plan, tmp_path, output="parts", max_steps=5, resume=True, lr_scheduler="constant")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert whole.measured.method == method
    weights = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("parts", "whole")
    ]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_model_trained_by_lora_is_loaded_without_peft(tmp_path: Path) -> None:
    run_tiny(plan_for("lora"), tmp_path, max_steps=2, save_steps=1)
    names = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").state_dict()
    assert not any("lora" in name or "base_layer" in name for name in names)


def test_lisa_draws_layers_anew_for_each_visit_and_always_trains_the_ends(tiny_llama: Any) -> None:
    model = tiny_llama(dtype=torch.float32, num_hidden_layers=6)
    optimizer = LisaOptimizer(
        torch.optim.AdamW(model.parameters()),
        list(model.named_parameters()),
        [[f"model.layers.{layer}"] for layer in range(6)],
        1,
        active_modules=["model.embed_tokens", "lm_head"],
        sampled_layers=2,
        verbose=0,
        seed=1,
    )
    seen = set()
    for _ in range(12):
        trained = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad and ".layers." in name}
        assert trained == {str(block) for block in optimizer.sampled_blocks}
        assert len(trained) == 2
        assert model.lm_head.weight.requires_grad
        assert model.model.embed_tokens.weight.requires_grad
        seen.add(frozenset(trained))
        optimizer.switch_trainable_params()
    assert len(seen) > 6
    assert set().union(*seen) == set("012345")


def test_mezo_estimates_the_slope_and_returns_to_the_weights() -> None:
    weight = torch.nn.Parameter(torch.tensor([3.0, -1.0]))
    optimizer = MezoOptimizer([weight], lr=0.0, epsilon=1e-3, seed=5)
    before = weight.detach().clone()
    optimizer.estimate(lambda: weight.square().sum() / 2)
    ((_, _, direction, _),) = optimizer._directions()
    assert float(optimizer.slope) == pytest.approx(float(before @ direction), rel=1e-2)  # exact for a parabola
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before, rtol=0, atol=1e-6)


def test_mezo_never_repeats_a_direction() -> None:
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = MezoOptimizer([weight], lr=0.0, epsilon=1e-3, seed=5)
    directions = []
    for _ in range(2):
        directions.append(next(optimizer._directions())[2])
        optimizer.step()
    assert not torch.equal(*directions)

"""The model that a run leaves has the evaluation loss that the run reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from badam.plan import Plan, config_digest
from badam.training import trainer as trainer_module
from badam.training.evaluation import evaluate
from badam.vocabulary import Method
from tests.badam.training.test_methods import BY_BLOCKS, RATES, plan_for
from tests.badam.training.tiny import CONFIG, run_tiny, tiny_plan

RELATIVE = 1e-3


def plan_with(method: Method, *, tied: bool, target_modules: tuple[str, ...] = ()) -> Plan:
    config = {**CONFIG, "tie_word_embeddings": tied}
    plan = tiny_plan() if method == "badam" else plan_for(method)
    spec = plan.model.model_copy(update={"config": config, "config_digest": config_digest(config)})
    options = plan.training.options.model_copy(update={"target_modules": target_modules})
    if tied and method not in ("badam", *BY_BLOCKS):  # the head has no name of its own
        block = plan.partition.blocks[0].model_copy(update={"prefixes": ("model",)})
        plan = plan.model_copy(update={"partition": plan.partition.model_copy(update={"blocks": (block,)})})
    return plan.model_copy(update={"model": spec, "training": plan.training.model_copy(update={"options": options})})


def losses(plan: Plan, directory: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """What the last evaluation of a run reported, and that of the model which the run has saved."""
    given: list[Any] = []

    def noted(model: Any, *others: Any) -> Any:
        given[:] = others
        return evaluate(model, *others)

    monkeypatch.setattr(trainer_module, "evaluate", noted)
    result, _ = run_tiny(plan, directory, max_steps=6, eval_steps=6, eval_share=0.25)
    reported = json.loads((directory / "run/evaluations.jsonl").read_text().splitlines()[-1])["loss"]
    assert result.model_path is not None
    saved = AutoModelForCausalLM.from_pretrained(result.model_path, dtype=torch.bfloat16)
    return reported, evaluate(saved, *given).loss


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "method", ["badam", *(pytest.param(name, marks=pytest.mark.slow) for name in (*RATES, *BY_BLOCKS))]
)
def test_the_saved_model_has_the_loss_of_the_last_evaluation(
    method: Method, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported, saved = losses(plan_with(method, tied=tied), tmp_path, monkeypatch)
    assert saved == pytest.approx(reported, rel=RELATIVE)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_of_two_that_share_their_weights_changes_that_one_alone(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_with("lora", tied=True, target_modules=(target,))
    spec = plan.training.optimizer.model_copy(update={"learning_rate": 0.1})
    plan = plan.model_copy(update={"training": plan.training.model_copy(update={"optimizer": spec})})
    reported, saved = losses(plan, tmp_path, monkeypatch)
    assert saved == pytest.approx(reported, rel=RELATIVE)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)

"""The one training step: its order, and that whoever makes a step makes this one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from badam import phases
from badam.profiling.record import load_measured
from badam.training import trainer as trainer_module
from badam.training.build import build_model, build_optimizer
from badam.training.methods import base as base_module
from badam.training.methods import method_of
from badam.training.step import train_step
from badam_planner.rehearsal import rehearse as rehearse_module
from tests.badam.training.tiny import run_tiny, tiny_plan


def test_a_step_goes_through_its_phases_in_order_and_leaves_no_gradient() -> None:
    plan = tiny_plan(training={"grad_accum": 2})
    model = build_model(plan.model, plan.training)
    optimizer, tokens = build_optimizer(model, plan), torch.ones((2, 16), dtype=torch.int64)
    seen: list[str] = []
    with phases.listening(lambda _previous, phase: seen.append(phase)):
        train_step(
            plan,
            method_of(plan.method),
            model,
            optimizer,
            lambda: ({"input_ids": tokens, "labels": tokens}, 60),
            micro_batches=2,
            on_loss=lambda _loss: seen.append("loss known"),
            on_norm=lambda _norm: seen.append("clipped"),
        )
    micro_batch = ["forward", "loss", "backward", "loss known"]
    assert seen == [*micro_batch, *micro_batch, "step", "clipped", "setup"]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_trainer_and_rehearsal_make_the_same_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def counted(*args: Any, **options: Any) -> None:
        made.append(type(args[3]).__name__)
        train_step(*args, **options)

    for module in (trainer_module, rehearse_module):
        monkeypatch.setattr(module, "train_step", counted)
    rehearse_module.rehearse(tiny_plan(), 0)
    assert made == ["BlockOptimizer"] * 2  # before and after the update that makes masters and moments
    run_tiny(tiny_plan(), tmp_path, max_steps=2)
    assert made == ["BlockOptimizer"] * 4


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_logged_as_it_is_and_those_after_it_too(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update of its step is left out, so the next loss is a number again."""
    forward_loss = base_module.forward_loss
    calls = 0

    def diverging(*args: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return forward_loss(*args, **options) * (value if calls == 2 else 1.0)

    monkeypatch.setattr(base_module, "forward_loss", diverging)
    result, printed = run_tiny(tiny_plan(), tmp_path, max_steps=3)
    lines = (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    first, second, third = (json.loads(line)["loss"] for line in lines)
    assert math.isfinite(first)
    assert str(second) == str(value)
    assert math.isfinite(third)
    assert f"loss {value}" in printed
    assert load_measured(result.measured_path).measurement.last_loss == third

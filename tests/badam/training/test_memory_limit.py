"""Going on when memory runs out, and losses that are scaled for float16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from badam.errors import InputError, OutOfMemory
from badam.training.methods import base as base_module
from badam.training.methods import mezo as mezo_module
from tests.badam.training.test_methods import plan_for
from tests.badam.training.tiny import run_tiny, tiny_plan


def slow(method: str) -> Any:
    """A method whose way is another's, for the slow tests."""
    return pytest.param(method, marks=pytest.mark.slow)


def metrics(directory: Path, name: str) -> list[Any]:
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)[name] for line in lines]


def refuse_more_than(
    monkeypatch: pytest.MonkeyPatch, rows: int, *, from_call: int = 1, after_backward: bool = True
) -> None:
    """Micro-batches of more than ``rows`` rows run out of memory, with half of their gradients made already."""
    calls = 0
    forward_loss = base_module.forward_loss

    class Refused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
            return loss.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    def limited(model: Any, batch: Any, *args: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = forward_loss(model, batch, *args, **options)
        if len(batch["input_ids"]) <= rows or calls < from_call:
            return loss
        if not loss.requires_grad:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        (loss * 3).backward(retain_graph=True)  # a torso that must not count
        return Refused.apply(loss)

    monkeypatch.setattr(base_module, "forward_loss", limited)
    monkeypatch.setattr(mezo_module, "forward_loss", limited)


@pytest.mark.parametrize(
    "method", ["badam", "badam-ratio", "lora", *(slow(name) for name in ("adam", "lisa", "hift", "galore"))]
)
def test_smaller_micro_batches_make_the_same_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """From the second micro-batch of the second step on, quarters: losses and norms are those of whole batches."""
    plan = plan_for(method) if method != "badam" else tiny_plan()
    sizes = {"batch_size": 4, "grad_accum": 2, "dtype": "float32"}
    plan = plan.model_copy(update={"training": plan.training.model_copy(update=sizes)})
    run_tiny(plan, tmp_path, output="whole", max_steps=3)
    refuse_more_than(monkeypatch, 1, from_call=4)
    result, printed = run_tiny(plan, tmp_path, output="pieces", max_steps=3, adapt=True)
    for figure in ("loss", "gradient_norm"):
        assert metrics(tmp_path / "pieces", figure) == pytest.approx(metrics(tmp_path / "whole", figure), rel=1e-3)
    assert "out of memory in backward of step 2: from here on 2 micro-batches of 2 in place of each of 4" in printed
    assert "from here on 4 micro-batches of 1" in printed
    assert (result.measured.training.batch_size, result.measured.training.grad_accum) == (1, 8)


def test_a_zeroth_order_step_begins_anew_from_where_the_weights_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for("mezo")
    plan = plan.model_copy(update={"training": plan.training.model_copy(update={"batch_size": 4, "dtype": "float32"})})
    run_tiny(plan, tmp_path, output="whole", max_steps=3)
    refuse_more_than(monkeypatch, 2, from_call=2)
    run_tiny(plan, tmp_path, output="pieces", max_steps=3, adapt=True)
    assert metrics(tmp_path / "pieces", "loss") == pytest.approx(metrics(tmp_path / "whole", "loss"), rel=1e-3)


def test_one_sequence_that_does_not_fit_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_more_than(monkeypatch, 0)
    with pytest.raises(OutOfMemory):
        run_tiny(tiny_plan(), tmp_path, adapt=True)


def test_without_adapt_the_message_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_more_than(monkeypatch, 1)
    with pytest.raises(OutOfMemory, match="--adapt"):
        run_tiny(tiny_plan(), tmp_path)


def test_a_method_that_updates_inside_backward_cannot_begin_a_step_anew(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot begin anew"):
        run_tiny(plan_for("lomo"), tmp_path, adapt=True)


@pytest.mark.parametrize("method", ["badam", "badam-ratio", "lora", *(slow(name) for name in ("adam", "lisa", "hift"))])
def test_float16_trains_as_float32_does_because_losses_are_scaled(tmp_path: Path, method: str) -> None:
    drawn, _ = run_tiny(tiny_plan(), tmp_path, output="drawn", max_steps=1)  # random weights depend on their type
    for dtype in ("float32", "float16"):
        plan = plan_for(method) if method != "badam" else tiny_plan()
        plan = plan.model_copy(update={"training": plan.training.model_copy(update={"dtype": dtype})})
        run_tiny(plan, tmp_path, output=dtype, max_steps=4, save_steps=2, init=str(drawn.model_path))
    norms = metrics(tmp_path / "float16", "gradient_norm")
    assert norms == pytest.approx(metrics(tmp_path / "float32", "gradient_norm"), rel=0.05)
    assert metrics(tmp_path / "float16", "loss") == pytest.approx(metrics(tmp_path / "float32", "loss"), rel=0.01)
    assert json.loads((tmp_path / "float16/checkpoint-4/loss_scale.json").read_text())["scale"] == 65536.0


@pytest.mark.parametrize("method", ["badam", "lora"])
def test_a_step_whose_gradients_overflow_is_skipped_and_the_scale_halved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    forward_loss = base_module.forward_loss
    calls = 0

    def overflowing(*args: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return forward_loss(*args, **options) * (1e36 if calls == 2 else 1)

    monkeypatch.setattr(base_module, "forward_loss", overflowing)
    plan = plan_for(method) if method != "badam" else tiny_plan()
    plan = plan.model_copy(update={"training": plan.training.model_copy(update={"dtype": "float16"})})
    run_tiny(plan, tmp_path, max_steps=3, save_steps=1)
    from safetensors.torch import load_file

    first, second, third = (load_file(tmp_path / f"run/checkpoint-{n}/model.safetensors") for n in (1, 2, 3))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(third[name], second[name]) for name in first)
    assert json.loads((tmp_path / "run/checkpoint-3/loss_scale.json").read_text())["scale"] == 32768.0

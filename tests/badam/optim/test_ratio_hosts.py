"""The ratio optimizer inside Hugging Face's Trainer and accelerate, with nothing patched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from badam.integrations.accelerate import clip_grad_norm_old_version
from badam.integrations.transformers import BAdamCallback
from badam.optim.ratio import BlockOptimizerRatio

ModelFactory = Callable[..., nn.Module]


class Tokens(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(0, 4, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def build(model: nn.Module, **options: Any) -> BlockOptimizerRatio:
    settings: dict[str, Any] = {"update_ratio": 1 / 3, "switch_every": 3, "lr": 5e-3, "verbose": 0}
    return BlockOptimizerRatio(list(model.parameters()), model.named_parameters(), **{**settings, **options})


def trainer(model: nn.Module, path: Path, **arguments: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    settings: dict[str, Any] = {
        "output_dir": str(path),
        "max_steps": 9,
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "max_grad_norm": 0.3,
        "lr_scheduler_type": "constant",
        "dataloader_pin_memory": False,
    }
    optimizers = (build(model), None)
    arguments_ = TrainingArguments(**{**settings, **arguments})
    return Trainer(
        model=model, args=arguments_, train_dataset=Tokens(), optimizers=optimizers, callbacks=[BAdamCallback]
    )


def losses(run: Any) -> list[float]:
    return [record["loss"] for record in run.state.log_history if "loss" in record]


def norms(run: Any) -> list[float]:
    return [record["grad_norm"] for record in run.state.log_history if "grad_norm" in record]


def test_trainer_clips_visits_and_resumes_within_a_visit(tiny_llama: ModelFactory, tmp_path: Path) -> None:
    whole = trainer(tiny_llama(), tmp_path / "whole")
    whole.train()
    optimizer = whole.optimizer.optimizer
    assert (optimizer.global_step, optimizer.visit, optimizer.steps_in_visit) == (9, 3, 0)
    assert losses(whole)[-1] < losses(whole)[0]
    assert min(norms(whole)[:4]) > 0.3  # otherwise nothing was clipped here

    first = trainer(tiny_llama(), tmp_path / "parts", save_strategy="steps", save_steps=4)
    first.train()
    resumed = trainer(tiny_llama(seed=1), tmp_path / "parts", save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert losses(resumed) == losses(whole)
    assert norms(resumed) == norms(whole)
    for found, wanted in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(found, wanted)


def test_the_trainers_clipping_is_what_a_plain_loop_does(tiny_llama: ModelFactory, tmp_path: Path) -> None:
    run = trainer(tiny_llama(), tmp_path, max_steps=2, gradient_accumulation_steps=1)
    batches = list(run.get_train_dataloader())[:2]
    run = trainer(tiny_llama(), tmp_path, max_steps=2, gradient_accumulation_steps=1)
    run.train()
    model = tiny_llama()
    optimizer = build(model)
    for batch, norm in zip(batches, norms(run), strict=True):
        model(**batch).loss.backward()
        assert optimizer.clip_grad_norm_(0.3).item() == pytest.approx(norm, rel=1e-5)
        optimizer.step()
    for found, wanted in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_accelerate_with_the_clipping_of_badam_1_x(tiny_llama: ModelFactory) -> None:
    from accelerate import Accelerator

    model = tiny_llama()
    twin = tiny_llama()
    accelerator = Accelerator(cpu=True)
    accelerator.clip_grad_norm_ = MethodType(clip_grad_norm_old_version, accelerator)
    model, optimizer = accelerator.prepare(model, build(model))
    other = build(twin)
    ids = Tokens()[0]["input_ids"][None]
    for _ in range(4):
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
        twin(input_ids=ids, labels=ids).loss.backward()
        assert torch.equal(norm, other.clip_grad_norm_(0.3))
        other.step()
    for found, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_activation_checkpointing_changes_no_bit(tiny_llama: ModelFactory) -> None:
    from badam.checkpointing import checkpoint_layers

    ids = Tokens()[0]["input_ids"][None]
    results = []
    for layers in ([], [f"model.layers.{index}" for index in range(3)]):
        model = tiny_llama().train()
        checkpoint_layers(model, layers)
        optimizer = build(model)
        for _ in range(4):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

"""Training in the Hugging Face Trainer and in TRL, with nothing patched by the user."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainerState, TrainingArguments

from badam import BAdamCallback, BlockOptimizer
from badam.errors import InputError
from tests.badam.optim.tiny_net import blocks, net
from tests.conftest import VOCABULARY

STEPS, EVERY, STOP = 27, 3, 13
"""Three block epochs of three blocks; the stop is within the second visit of the second one."""


def optimizer_for(model: nn.Module, **options: Any) -> BlockOptimizer:
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    exempt = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    base = torch.optim.AdamW(
        [{"params": exempt, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}], lr=1e-2
    )
    settings = {"switch_block_every": EVERY, "switch_mode": "random", "verbose": 0, **options}
    return BlockOptimizer(base, list(model.named_parameters()), **settings)


def rows() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (2 * STEPS, 12), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * 12] * len(ids)})


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_grad_norm": 0.5,
        "lr_scheduler_type": "cosine",
    }
    return {**settings, **options}


def trainer_for(model: nn.Module, folder: Path, optimizer: BlockOptimizer | None = None, **options: Any) -> Trainer:
    return Trainer(
        model,
        TrainingArguments(**arguments(folder, **options)),
        train_dataset=rows(),
        optimizers=(optimizer or optimizer_for(model), None),
        callbacks=[BAdamCallback],
    )


def curve(trainer: Any) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in trainer.state.log_history if "loss" in record]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_resumes_within_a_visit_identically(tiny_llama: Any, tmp_path: Path, checkpointing: bool) -> None:
    options = {"gradient_checkpointing": checkpointing}
    whole = trainer_for(model := tiny_llama(), tmp_path / "whole", **options)
    whole.train()
    expected = curve(whole)
    assert len(expected) == STEPS
    assert all(norm > 0 for _, norm in expected)

    saving = {**options, "save_strategy": "steps", "save_steps": STOP}
    trainer_for(tiny_llama(), tmp_path / "parts", **saving).train()
    second = trainer_for(resumed := tiny_llama(seed=1), tmp_path / "parts", **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The trainer goes on")
        second.train(resume_from_checkpoint=str(tmp_path / "parts" / f"checkpoint-{STOP}"))
    assert curve(second) == expected
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_trl_resumes_within_a_visit_identically(tiny_llama: Any, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({str(index): index for index in range(VOCABULARY)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")

    def trainer(model: nn.Module, **options: Any) -> Any:
        return SFTTrainer(
            model,
            SFTConfig(**arguments(tmp_path / "trl", gradient_checkpointing=True, bf16=False, max_length=16, **options)),
            train_dataset=rows().remove_columns(["labels", "attention_mask"]),
            processing_class=tokenizer,
            optimizers=(optimizer_for(model), None),
            callbacks=[BAdamCallback()],
        )

    whole = trainer(tiny_llama(), save_strategy="steps", save_steps=STOP)
    whole.train()
    expected = curve(whole)
    assert len(expected) == STEPS
    second = trainer(tiny_llama(seed=1))
    second.train(resume_from_checkpoint=str(tmp_path / "trl" / f"checkpoint-{STOP}"))
    assert curve(second) == expected


def test_checkpointing_keeps_no_graph_below_the_active_block(tiny_llama: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    optimizer = optimizer_for(model, switch_mode="descending", switch_block_every=100)
    seen: list[bool] = []
    model.model.layers[1].register_forward_hook(lambda _, __, output: seen.append(output.requires_grad))
    trainer_for(model, tmp_path, optimizer, gradient_checkpointing=True, max_steps=2).train()
    assert seen
    assert not any(seen)


def test_hidden_gradients_are_clipped_and_their_norm_is_logged(
    tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visible = trainer_for(model := tiny_llama(), tmp_path / "visible")
    visible.train()
    monkeypatch.setattr("badam.optim.visit.HAS_GRAD_DTYPE", False)  # as on older torch
    hidden = trainer_for(twin := tiny_llama(), tmp_path / "hidden")
    hidden.train()
    for ours, expected in zip(curve(hidden), curve(visible), strict=True):
        assert ours == pytest.approx(expected, rel=1e-5)
    assert max(norm for _, norm in curve(hidden)) > 0.5  # so that clipping has had something to do
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name), rtol=1e-2, atol=1e-4)


def test_the_last_block_is_written_back_at_the_end(tiny_llama: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    optimizer = optimizer_for(model, switch_block_every=100)
    trainer_for(model, tmp_path, optimizer, max_steps=3).train()
    rounded = [torch.equal(m.weight, m.master.to(torch.bfloat16)) for m in optimizer.active_parameters]
    assert not all(rounded)
    for member in optimizer.active_parameters:
        torch.testing.assert_close(member.weight.float(), member.master.detach(), rtol=2**-7, atol=1e-6)


def test_the_best_model_is_not_overwritten_at_the_end(tiny_llama: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    trainer = Trainer(
        model,
        TrainingArguments(
            **arguments(
                tmp_path,
                max_steps=4,
                save_strategy="steps",
                save_steps=1,
                eval_strategy="steps",
                eval_steps=1,
                load_best_model_at_end=True,
                metric_for_best_model="worst",
                learning_rate=0.1,
            )
        ),
        train_dataset=rows(),
        eval_dataset=rows().select(range(2)),
        optimizers=(optimizer_for(model, switch_block_every=100), None),
        callbacks=[BAdamCallback],
        compute_metrics=lambda _: {"worst": -float(trainer.state.global_step)},
    )
    trainer.train()
    from safetensors.torch import load_file

    best = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, best[name]), name


def test_releasing_gradients_refuses_arguments_that_need_them(tiny_llama: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    release = optimizer_for(model, gradient_release=True)
    with pytest.raises(InputError, match=r"max_grad_norm=0\.5 cannot be applied"):
        trainer_for(model, tmp_path, release).train()
    with pytest.raises(InputError, match="over 2 batches"):
        trainer_for(model, tmp_path, release, max_grad_norm=0.0, gradient_accumulation_steps=2).train()


def test_releasing_gradients_trains_in_the_trainer(tiny_llama: Any, tmp_path: Path) -> None:
    expected = trainer_for(model := tiny_llama(), tmp_path, max_grad_norm=0.0)
    expected.train()
    released = tiny_llama()
    trainer = trainer_for(released, tmp_path, optimizer_for(released, gradient_release=True), max_grad_norm=0.0)
    trainer.train()
    assert [loss for loss, _ in curve(trainer)] == [loss for loss, _ in curve(expected)]
    for name, parameter in released.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


@pytest.mark.parametrize(("dynamic", "first", "expected"), [(True, 16, 10), (True, 8, 8), (False, 16, 16)])
def test_deepspeed_is_told_of_and_its_first_loss_scale_lowered_unless_it_was_chosen(
    monkeypatch: pytest.MonkeyPatch, dynamic: bool, first: int, expected: int
) -> None:
    class Scaler:
        cur_scale = 2.0**first

    class Engine:
        def __init__(self, optimizer: BlockOptimizer) -> None:
            self.optimizer = optimizer
            self.loss_scaler = Scaler()
            self.dynamic_loss_scale = dynamic

    class Adapter:
        ranks = None

        def __init__(self, engine: Engine, _: BlockOptimizer) -> None:
            self.engine = engine

    class Wrapper:
        def __init__(self, optimizer: Engine) -> None:
            self.optimizer = optimizer

    monkeypatch.setattr("badam.distributed.deepspeed.adapter.ZeroThree", Adapter)
    engine = Engine(blocks(net()))
    callback = BAdamCallback(init_loss_scale=10)
    arguments = TrainingArguments("unused", use_cpu=True)
    callback.on_train_begin(arguments, TrainerState(), None, model=None, optimizer=Wrapper(engine))
    assert engine.optimizer.ds_optimizer is engine
    assert engine.loss_scaler.cur_scale == 2**expected


def test_an_optimizer_that_accelerate_has_put_in_our_place_is_refused() -> None:
    theirs = type("DeepSpeedCPUAdam", (torch.optim.AdamW,), {"__module__": "deepspeed.ops.adam.cpu_adam"})
    wrapped = SimpleNamespace(optimizer=SimpleNamespace(optimizer=theirs([nn.Parameter(torch.zeros(1))])))
    with pytest.raises(InputError, match="accelerate has replaced the block optimizer by DeepSpeed's DeepSpeedCPUAdam"):
        BAdamCallback().on_train_begin(
            TrainingArguments("unused", use_cpu=True), TrainerState(), None, model=None, optimizer=wrapped
        )


def test_a_checkpoint_without_the_optimizers_state_is_warned_of(tiny_llama: Any, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": STOP, "save_only_model": True}
    trainer_for(tiny_llama(), tmp_path, max_steps=STOP, **saving).train()
    resumed = trainer_for(tiny_llama(), tmp_path, max_steps=STOP + 1)
    with pytest.warns(UserWarning, match=f"goes on after step {STOP}, but no state of the optimizer was loaded"):
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))


def test_other_optimizers_are_left_alone() -> None:
    callback = BAdamCallback()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    for event in (callback.on_train_begin, callback.on_pre_optimizer_step, callback.on_log, callback.on_train_end):
        event(TrainingArguments("unused", use_cpu=True), TrainerState(), None, optimizer=optimizer)

"""From data to a trainer that has everything: tokens within the plan's length, batches, settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig

from badam.errors import InputError
from badam.integrations.transformers import BAdamCallback
from badam.plan import Plan
from badam.profiling.recorder import Recorder
from badam.training.data.batches import LengthReport, PlanCollator
from badam.training.data.classes import ClassCollator, Classes, encode
from badam.training.data.inputs import Inputs
from badam.training.engines import kind_of
from badam.training.options import RunOptions
from badam.training.trainer import LanguageModelTrainer, PlanTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# transformers' own checkpointing changed its name in 5.23; TRL would switch it on, beside the plan's.
OWN_CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
EVERY_EPOCH = 500  # transformers wants a number of steps even where it counts epochs


@dataclass(frozen=True, slots=True)
class Prepared:
    """A trainer, and what to tell of its data."""

    trainer: PlanTrainer
    lengths: LengthReport
    packed: int | None = None  # rows that the examples were packed into

    @property
    def sentence(self) -> str:
        """The lengths on one line."""
        return f"{self.lengths}" + ("" if self.packed is None else f"; packed into {self.packed:,} rows")


def prepare_trainer(
    plan: Plan,
    options: RunOptions,
    model: PreTrainedModel,
    inputs: Inputs,
    recorder: Recorder,
    tell: Callable[[str], None],
    **together: Any,
) -> Prepared:
    """The trainer of the plan's task over the run's data; ``together`` is for PlanTrainer.

    Raises:
        DataError: if the data is longer than allowed, or has nothing to learn within the plan's length.
        InputError: if an option does not go with the task.
    """
    shared: dict[str, Any] = {
        "plan": plan,
        "model": model,
        "args": training_arguments(plan, options, recorder.device),
        "processing_class": inputs.tokenizer,
        "padding": options.padding,
        "before_step": recorder.next_step,
        "keep": options.keep,
        "tell": tell,
        "adapt": options.adapt,
        "callbacks": _callbacks(plan, options),
        **together,
    }
    prepare = _classifier if plan.model.task == "sequence-classification" else _language_model
    prepared = prepare(plan, options, inputs, shared)
    prepared.trainer.remove_callback(PrinterCallback)
    return prepared


def _callbacks(plan: Plan, options: RunOptions) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = [EarlyStoppingCallback(options.patience)] if options.patience else []
    # Of several processes the optimizer keeps the gradients, so that it alone can clip them.
    return [*callbacks, BAdamCallback()] if kind_of(plan).is_for_several else callbacks


def _language_model(plan: Plan, _options: RunOptions, inputs: Inputs, shared: dict[str, Any]) -> Prepared:
    assert inputs.lengths is not None, "the data of a language model has been tokenized"
    trainer = LanguageModelTrainer(
        **shared,
        collator=PlanCollator(plan.training.seq_len, inputs.pad_token_id),
        train_dataset=inputs.training.dataset,
        eval_dataset=inputs.evaluation.dataset if inputs.evaluation else None,
    )
    return Prepared(trainer, inputs.lengths, inputs.packed)


def _classifier(plan: Plan, options: RunOptions, inputs: Inputs, shared: dict[str, Any]) -> Prepared:
    if options.pack:
        raise InputError("Examples of a classification cannot be packed: each has one label.", advice="Drop --pack.")
    tokenizer, config, limit = inputs.tokenizer, shared["model"].config, plan.training.seq_len
    rows = inputs.vocabulary_size
    classes = Classes.of(inputs.training.dataset["label"], config.num_labels)
    classes.name_in(config)
    training, lengths = encode(inputs.training.dataset, tokenizer, classes, limit, options.on_long, rows=rows)
    evaluation = None
    if inputs.evaluation is not None:
        evaluation, _ = encode(inputs.evaluation.dataset, tokenizer, classes, limit, options.on_long, rows=rows)
    pad_token_id = inputs.pad_token_id
    if config.pad_token_id is None:
        config.pad_token_id = pad_token_id  # decoders classify by their last token that is no padding
    trainer = PlanTrainer(
        **shared,
        collator=ClassCollator(limit, pad_token_id, token_types=getattr(config, "type_vocab_size", 0) > 1),
        train_dataset=training,
        eval_dataset=evaluation,
    )
    return Prepared(trainer, lengths)


def training_arguments(plan: Plan, options: RunOptions, device: torch.device) -> TrainingArguments:
    """Hugging Face's settings for a plan; what the plan's own code does is switched off there.

    Args:
        plan: what to run; TRL's settings are given for a language model only.
        options: what a run needs beyond the plan.
        device: where to train.
    """
    training, optimizer = plan.training, plan.training.optimizer
    settings: dict[str, Any] = {
        "output_dir": str(options.output_dir),
        "per_device_train_batch_size": training.batch_size,
        "per_device_eval_batch_size": training.batch_size,
        "gradient_accumulation_steps": training.grad_accum,
        "max_steps": options.max_steps or -1,
        "num_train_epochs": options.epochs,
        "learning_rate": optimizer.learning_rate,
        "max_grad_norm": optimizer.max_grad_norm,
        "lr_scheduler_type": options.lr_scheduler,
        "warmup_steps": options.warmup_steps or options.warmup_share,  # below 1 it is a share of all steps
        "logging_steps": 1,
        "seed": options.seed,
        "use_cpu": device.type == "cpu",
        "bf16": False,  # the model is in the plan's type already; these switch autocast on
        "fp16": False,
        "report_to": list(options.report_to) or "none",
        "disable_tqdm": True,
        "average_tokens_across_devices": kind_of(plan).is_for_several,
        **_saving(options),
        **_evaluating(plan, options),
    }
    if plan.model.task != "causal-lm":
        return TrainingArguments(**settings)
    return SFTConfig(
        **settings,
        **{OWN_CHECKPOINTING: False},
        max_length=None,  # the data is tokenized, and the collator cuts
    )


def _saving(options: RunOptions) -> dict[str, Any]:
    if options.checkpoint_steps is None and not options.keep_best:
        return {"save_strategy": "no"}
    return {
        "save_strategy": "steps" if options.checkpoint_steps else "epoch",
        "save_steps": options.checkpoint_steps or EVERY_EPOCH,
    }


def _evaluating(plan: Plan, options: RunOptions) -> dict[str, Any]:
    if not options.evaluates:
        return {"eval_strategy": "no"}
    return {
        "eval_strategy": "steps" if options.evaluation_steps else "epoch",
        "eval_steps": options.evaluation_steps or EVERY_EPOCH,
        "load_best_model_at_end": options.keep_best,
        "metric_for_best_model": "loss" if plan.model.task == "causal-lm" else "accuracy",
        # Without this a resumed run would count its patience anew.
        "restore_callback_states_from_checkpoint": options.patience is not None,
    }

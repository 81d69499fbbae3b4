"""Hugging Face's settings for a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments
from trl import SFTConfig
from trl.chat_template_utils import get_training_chat_template

from badam.plan import Plan
from badam.training.data.dataset import TrainingData
from badam.training.options import RunOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# transformers' own checkpointing changed its name in 5.23; TRL would switch it on, beside the plan's.
OWN_CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
EVERY_EPOCH = 500  # transformers wants a number of steps even where it counts epochs


def training_arguments(
    plan: Plan, options: RunOptions, device: torch.device, *, assistant_only: bool
) -> TrainingArguments:
    """Hugging Face's settings for a plan; what the plan's own code does is switched off there.

    Args:
        plan: what to run; TRL's settings are given for a language model only.
        options: what a run needs beyond the plan.
        device: where to train.
        assistant_only: take the loss of conversations over what the assistant says.
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
        "average_tokens_across_devices": plan.target.engine != "single",
        **_saving(options),
        **_evaluating(plan, options),
    }
    if plan.model.task != "causal-lm":
        return TrainingArguments(**settings)
    return SFTConfig(
        **settings,
        **{OWN_CHECKPOINTING: False},
        max_length=None,  # TRL tokenizes whole examples, so that lengths can be told before they are cut
        assistant_only_loss=assistant_only,
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


def marks_assistant(data: TrainingData, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template lets the loss be taken over the assistant's words alone."""
    if data.kind != "messages":
        return False
    try:
        get_training_chat_template(tokenizer)
    except ValueError:
        return False
    return True

"""Hugging Face's settings for a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from trl import SFTConfig
from trl.chat_template_utils import get_training_chat_template

from badam.plan import Plan
from badam.training.data import TrainingData
from badam.training.options import RunOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def training_arguments(plan: Plan, options: RunOptions, device: torch.device, *, assistant_only: bool) -> SFTConfig:
    """Hugging Face's settings for a plan; what the plan's own code does is switched off there."""
    training, optimizer = plan.training, plan.training.optimizer
    return SFTConfig(
        output_dir=str(options.output_dir),
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.grad_accum,
        max_steps=options.max_steps or -1,
        num_train_epochs=options.epochs,
        learning_rate=optimizer.learning_rate,
        max_grad_norm=optimizer.max_grad_norm,
        lr_scheduler_type=options.lr_scheduler,
        warmup_steps=options.warmup_steps,
        logging_steps=1,
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 500,
        seed=options.seed,
        use_cpu=device.type == "cpu",
        bf16=False,  # the model is in the plan's type already; these switch autocast on
        fp16=False,
        activation_checkpointing=False,
        max_length=None,  # TRL tokenizes whole examples, so that lengths can be told before they are cut
        assistant_only_loss=assistant_only,
        report_to=list(options.report_to) or "none",
        disable_tqdm=True,
        average_tokens_across_devices=False,
    )


def marks_assistant(data: TrainingData, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template lets the loss be taken over the assistant's words alone."""
    if data.kind != "messages":
        return False
    try:
        get_training_chat_template(tokenizer)
    except ValueError:
        return False
    return True

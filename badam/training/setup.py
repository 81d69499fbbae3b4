"""From data to a trainer that has everything: tokens within the plan's length, batches, settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from badam.errors import InputError
from badam.integrations.transformers import BAdamCallback
from badam.plan import Plan
from badam.profiling.recorder import Recorder
from badam.training.arguments import marks_assistant, training_arguments
from badam.training.data.batches import LengthReport, PlanCollator, enforce_length, pack
from badam.training.data.classes import ClassCollator, Classes, encode
from badam.training.data.inputs import Inputs
from badam.training.loop import PlanLoop
from badam.training.options import RunOptions
from badam.training.trainer import PlanClassifier, PlanTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Prepared:
    """A trainer, and what to tell of its data."""

    trainer: PlanLoop
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
    """The trainer of the plan's task over the run's data; ``together`` is for PlanLoop.

    Raises:
        DataError: if the data is longer than allowed, or has nothing to learn within the plan's length.
        InputError: if an option does not go with the task.
    """
    assistant_only = marks_assistant(inputs.training, inputs.tokenizer)
    shared: dict[str, Any] = {
        "plan": plan,
        "model": model,
        "args": training_arguments(plan, options, recorder.device, assistant_only=assistant_only),
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
    return callbacks if plan.target.engine == "single" else [*callbacks, BAdamCallback()]


def _language_model(plan: Plan, options: RunOptions, inputs: Inputs, shared: dict[str, Any]) -> Prepared:
    limit, pad_token_id = plan.training.seq_len, inputs.tokenizer.pad_token_id
    assert isinstance(pad_token_id, int), "the tokenizer was prepared"
    trainer = PlanTrainer(
        **shared,
        collator=PlanCollator(limit, pad_token_id),
        train_dataset=inputs.training.dataset,
        eval_dataset=inputs.evaluation.dataset if inputs.evaluation else None,
    )
    trainer.train_dataset, lengths = enforce_length(trainer.train_dataset, limit, options.on_long)
    if trainer.eval_dataset is not None:
        trainer.eval_dataset, _ = enforce_length(trainer.eval_dataset, limit, options.on_long)
    if not options.pack:
        return Prepared(trainer, lengths)
    trainer.train_dataset = pack(trainer.train_dataset, limit)
    return Prepared(trainer, lengths, len(trainer.train_dataset))


def _classifier(plan: Plan, options: RunOptions, inputs: Inputs, shared: dict[str, Any]) -> Prepared:
    if options.pack:
        raise InputError("Examples of a classification cannot be packed: each has one label.", advice="Drop --pack.")
    tokenizer, config, limit = inputs.tokenizer, shared["model"].config, plan.training.seq_len
    classes = Classes.of(inputs.training.dataset["label"], config.num_labels)
    classes.name_in(config)
    training, lengths = encode(inputs.training.dataset, tokenizer, classes, limit, options.on_long)
    evaluation = None
    if inputs.evaluation is not None:
        evaluation, _ = encode(inputs.evaluation.dataset, tokenizer, classes, limit, options.on_long)
    pad_token_id = tokenizer.pad_token_id
    assert isinstance(pad_token_id, int), "the tokenizer was prepared"
    if config.pad_token_id is None:
        config.pad_token_id = pad_token_id  # decoders classify by their last token that is no padding
    trainer = PlanClassifier(
        **shared,
        collator=ClassCollator(limit, pad_token_id, token_types=getattr(config, "type_vocab_size", 0) > 1),
        train_dataset=training,
        eval_dataset=evaluation,
    )
    return Prepared(trainer, lengths)

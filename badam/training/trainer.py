"""TRL's trainer, running a plan: its loss, optimizer and checkpointing are those that the planner rehearses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from trl import SFTTrainer

from badam import phases
from badam.plan import Plan
from badam.profiling.states import unwrap
from badam.training.assemble import build_optimizer, prepare_checkpointing
from badam.training.batches import EpochSampler, Padding, PlanCollator
from badam.training.checkpoints import keep_newest, saving, written_whole
from badam.training.methods import method_of
from badam.vocabulary import Phase

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
    from trl import SFTConfig

BeforeStep = Callable[[Sequence[Mapping[str, Tensor]]], None]

FULL_LENGTH_STEPS = 2
"""With padding "auto", so many steps at the start of each visit use the plan's full length: the second is the first
in which the block's moments exist, so whether the plan fits is known as early as can be."""


class PlanTrainer(SFTTrainer):
    """Trains one model under one plan.

    TRL tokenizes and builds labels; Hugging Face's Trainer runs the loop, schedules the learning rate, logs, saves and
    resumes. What decides memory is replaced: loss, optimizer, checkpointing, batches and the life of the batch.

    Args:
        plan: what to run.
        model: built from the plan, in training mode.
        args: settings of the loop.
        dataset: in TRL's form.
        tokenizer: pads on the right.
        padding: ``plan`` pads every batch to the plan's length, ``longest`` to its longest example, ``auto`` to the
            plan's length for the first steps of each visit.
        before_step: called with the micro-batches of each optimizer step.
        keep: checkpoints to keep; None keeps all.
    """

    # forward_loss divides by the label tokens of the whole optimizer step.
    loss_is_scaled_for_ga = True

    optimizer: torch.optim.Optimizer | None  # accelerate's wrapper around the plan's, once training has begun

    def __init__(
        self,
        *,
        plan: Plan,
        model: PreTrainedModel,
        args: SFTConfig,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        padding: Padding = "auto",
        before_step: BeforeStep | None = None,
        keep: int | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.plan = plan
        self.method = method_of(plan.method)
        self._padding = padding
        self._before_step = before_step
        self._keep = keep
        self._save_into: Path | None = None
        self._sampler: EpochSampler | None = None
        collator = PlanCollator(plan.training.seq_len, cast(int, tokenizer.pad_token_id))
        super().__init__(
            model=model,
            args=args,
            train_dataset=dataset,
            processing_class=tokenizer,
            data_collator=collator,
            callbacks=callbacks,
        )
        self.collator = collator
        # TRL sets a forward of its own on the model, for its fused head; ours is called as the rehearsal calls it.
        self.model.__dict__.pop("forward", None)

    # What the plan decides

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The plan's optimizer, and checkpointing that follows its switches."""
        if self.optimizer is None:
            optimizer = build_optimizer(self.model, self.plan)
            prepare_checkpointing(self.model, optimizer, self.plan)
            self.optimizer = optimizer
        return self.optimizer

    @property
    def plan_optimizer(self) -> torch.optim.Optimizer:
        """The plan's optimizer, without accelerate's wrapper."""
        assert self.optimizer is not None, "training has begun, so there is an optimizer"
        return unwrap(self.optimizer)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The plan's loss of one micro-batch."""
        return self.method.loss(
            cast("PreTrainedModel", model), inputs, self.plan, self.plan_optimizer, num_items_in_batch
        )

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one micro-batch; on return the optimizer's step begins, or the next micro-batch.

        In place of transformers' own, whose backward is accelerate's: what backward is, the method says. One process
        without loss scaling needs nothing else of both.
        """
        model.train()
        batch = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, batch, num_items_in_batch=num_items_in_batch)
        del batch
        self.method.backward(loss, self.plan_optimizer)
        phases.enter(Phase.STEP if self.accelerator.sync_gradients else Phase.SETUP)
        return loss.detach()

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move a batch to the device; in training it belongs to the step from then on, which lets go of it."""
        prepared = cast("dict[str, Any]", super()._prepare_inputs(inputs))
        if self.model.training:
            inputs.clear()
        return prepared

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm, where clipping has computed it; without clipping nothing is computed."""
        return None if grad_norm is None else super()._get_grad_norm(model, grad_norm)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """0: nobody reads it, and transformers would walk through all parameters in every step to tell."""
        return 0

    def _send_telemetry(self) -> None:
        """Nothing is sent."""

    # Data

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of the plan's size in an order that depends on seed and epoch only.

        accelerate's loader would hold the next batch on the device while this one trains; one process needs none of
        what it adds.
        """
        self._sampler = EpochSampler(self.train_dataset, self.args.seed)
        return DataLoader(
            self.train_dataset,
            batch_size=self.plan.training.batch_size,
            sampler=self._sampler,
            collate_fn=self.collator,
            pin_memory=self.args.device.type == "cuda",
        )

    def begin_epoch(self, epoch: int) -> None:
        """Draw the order of ``epoch``; called before its first batch."""
        assert self._sampler is not None, "training has begun, so there is a loader"
        self._sampler.epoch = epoch

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of one optimizer step, padded as asked."""
        steps_in_visit = getattr(self.plan_optimizer, "steps_in_visit", 0)
        begins = self._padding == "auto" and steps_in_visit < FULL_LENGTH_STEPS
        self.collator.full_length = self._padding == "plan" or begins
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if self._before_step is not None:
            self._before_step(batches)
        return batches, num_items

    # Saving

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint whole or not at all; the previous one stays until then."""
        name = f"checkpoint-{self.state.global_step}"
        output = Path(self.args.output_dir)
        with saving(f"checkpoint of step {self.state.global_step}"), written_whole(output / name) as partial:
            self._save_into = partial
            try:
                # Past TRL's method, which writes a model card, to the one that writes <run directory>/<name>.
                Trainer._save_checkpoint(self, model, trial)
            finally:
                self._save_into = None
            for entry in (partial / name).iterdir():
                entry.rename(partial / entry.name)
            (partial / name).rmdir()
        if self._keep:
            keep_newest(output, self._keep)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._save_into or super()._get_output_dir(trial))

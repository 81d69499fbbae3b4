"""Hugging Face's loop, running a plan: its loss, optimizer and checkpointing are those that the planner rehearses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from badam import phases
from badam.plan import Plan
from badam.profiling.memory.states import unwrap
from badam.training.build import build_optimizer, prepare_checkpointing
from badam.training.data.batches import Collator, EpochSampler
from badam.training.engines import Engine, engine_of
from badam.training.evaluation import evaluate
from badam.training.memory_limit import MicroBatches
from badam.training.methods import method_of
from badam.training.out_of_memory import is_refusal
from badam.training.processes import Processes, explain_lost_processes
from badam.training.run_directory import is_whole, keep_newest, saving
from badam.vocabulary import Padding, Phase

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerControl


FULL_LENGTH_STEPS = 2
"""With padding "auto", so many steps at the start of each visit use the plan's full length: the second is the first
in which the block's moments exist, so whether the plan fits is known as early as can be."""

LOSS_SCALE, SCHEDULER = "loss_scale.json", "scheduler.pt"


class BeforeStep(Protocol):
    """Told of each optimizer step before its forward; badam.profiling.recorder.Recorder.next_step is one."""

    def __call__(self, batches: Sequence[Mapping[str, Tensor]], *, full_length: bool) -> None:
        """The step's micro-batches, and whether they and those of the visit's second step are padded to the plan."""


class PlanLoop(Trainer):
    """Trains one model under one plan.

    Hugging Face's Trainer runs the loop, schedules the learning rate, logs, saves and resumes. What decides memory is
    replaced: loss, optimizer, checkpointing, batches and the life of the batch.

    Args:
        plan: what to run.
        collator: makes batches of the plan's size.
        padding: ``plan`` pads every batch to the plan's length, ``longest`` to its longest example, ``auto`` to the
            plan's length for the first steps of each visit.
        before_step: called with the micro-batches of each optimizer step.
        keep: checkpoints to keep, besides the best one; None keeps all.
        tell: called with sentences for the user.
        adapt: go on with smaller micro-batches when memory runs out in forward or backward.
        processes: those that run the plan together; this one alone by default.
        engine: what the plan's engine does otherwise.
        options: for Trainer.
    """

    # The losses divide by the label tokens of the whole optimizer step.
    loss_is_scaled_for_ga = True

    control: TrainerControl
    optimizer: torch.optim.Optimizer | None  # accelerate's wrapper around the plan's, once training has begun

    def __init__(
        self,
        *,
        plan: Plan,
        collator: Collator,
        padding: Padding = "auto",
        before_step: BeforeStep | None = None,
        keep: int | None = None,
        tell: Callable[[str], None] = lambda _text: None,
        adapt: bool = False,
        processes: Processes | None = None,
        engine: Engine | None = None,
        **options: Any,
    ) -> None:
        self.plan = plan
        self.method = method_of(plan.method)
        self.processes = processes or Processes()
        self.engine = engine or engine_of(plan)
        self.collator = collator
        self.has_best_weights = False  # the model holds those of the best checkpoint, not the last ones
        self.micro_batches = MicroBatches(plan.training.batch_size) if adapt else None
        self.steps_made = 0  # of the optimizer, by this process
        self._padding = padding
        self._before_step = before_step
        self._keep = keep
        self._tell = tell
        self._save_into: Path | None = None
        self._sampler: EpochSampler | None = None
        self._scaler: torch.amp.GradScaler | None = None
        super().__init__(data_collator=collator, **options)
        if self.args.world_size > 1:  # the engine has placed the model: accelerate shall neither wrap nor move it
            self.accelerator.prepare_model = lambda model, *_, **__: model
        self.model_accepts_loss_kwargs = True  # so that label tokens are counted over the whole step
        if plan.training.dtype == "float16" and self.method.keeps_gradients:
            self._scaler = torch.amp.GradScaler(self.args.device.type)

    # What the plan decides

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The plan's optimizer, and checkpointing that follows its switches."""
        if self.optimizer is None:
            optimizer = build_optimizer(self.model, self.plan)
            prepare_checkpointing(self.model, optimizer, self.plan)
            self.optimizer = self.engine.drive(self.model, optimizer)
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
        """The plan's loss of one micro-batch; of several processes the mean of theirs is that of all labels."""

        def compute() -> Tensor:
            return self.method.loss(
                cast("PreTrainedModel", model), inputs, self.plan, self.plan_optimizer, num_items_in_batch
            )

        within = getattr(model, "loss_within", None) if self.plan.training.loss == "chunked" else None
        loss: Tensor = compute() if within is None else within(compute)
        return loss if num_items_in_batch is None else loss * self.args.world_size

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one micro-batch; on return the optimizer's step begins, or the next micro-batch.

        In place of transformers' own, whose backward is accelerate's: what backward is, the method says. One process
        needs nothing else of both.
        """
        model.train()
        if self.micro_batches is None:
            loss = self._forward_backward(model, inputs, num_items_in_batch)
        else:
            inputs.clear()
            loss = self._adapting(model, self.micro_batches, num_items_in_batch)
        if self.accelerator.sync_gradients and self._scaler is not None:
            self._unscale(self._scaler)
        phases.enter(Phase.STEP if self.accelerator.sync_gradients else Phase.SETUP)
        self.steps_made += self.accelerator.sync_gradients
        return loss

    def _forward_backward(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None) -> Tensor:
        batch = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, batch, num_items_in_batch=num_items)
        del batch
        scaled = loss if self._scaler is None else self._scaler.scale(loss)
        last = self.accelerator.sync_gradients
        self.engine.backward(scaled, self.method, self.plan_optimizer, is_last=last)
        return loss.detach()

    def _adapting(self, model: nn.Module, micro: MicroBatches, num_items: Tensor | int | None) -> Tensor:
        """The next micro-batch of the step, in as many pieces as memory asks for."""
        todo = [micro.next_batch()]
        while True:
            try:
                for batch in todo:
                    pieces = [self._piece(model, piece, num_items) for piece in micro.pieces(batch)]
                return torch.stack(pieces).sum()
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_refusal(error) or not micro.can_halve:
                    raise
                phase = phases.current()
            # Out of the handler, whose traceback held the graph. Gradients of the step so far are a torso: once more.
            micro.halve()
            self.method.discard_gradients(model, self.plan_optimizer)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            todo = micro.batches_so_far()
            self._tell(
                f"out of memory in {phase} of step {self.state.global_step + 1}: from here on {micro.parts} "
                f"micro-batches of {micro.rows} in place of each of {self.plan.training.batch_size}"
            )

    def _piece(self, model: nn.Module, piece: dict[str, Tensor], num_items: Tensor | int | None) -> Tensor:
        phases.enter(Phase.SETUP)
        return self._forward_backward(model, piece, num_items)

    def _unscale(self, scaler: torch.amp.GradScaler) -> None:
        """Take the scale out of the step's gradients; drop them if one overflowed, and try a smaller scale then."""
        optimizer = self.plan_optimizer
        before = scaler.get_scale()
        scaler.unscale_(optimizer)
        scaler.update()
        if scaler.get_scale() < before and not hasattr(optimizer, "non_finite_steps"):
            optimizer.zero_grad(set_to_none=True)  # ours see for themselves, and count

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move a batch to the device; in training it belongs to the step from then on, which lets go of it."""
        prepared = cast("dict[str, Any]", super()._prepare_inputs(inputs))
        if self.model.training:
            inputs.clear()
        return prepared

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm, where clipping has computed it; without clipping nothing is computed."""
        return None if grad_norm is None else super()._get_grad_norm(model, grad_norm)

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        """One epoch; nothing of it where the run that is resumed had made all its steps."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*arguments, **options)

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
        self._sampler = EpochSampler(self.train_dataset, self.args.seed, self.args.process_index, self.args.world_size)
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
        if self.micro_batches is not None:
            self.micro_batches.begin_step(batches)
        if self._before_step is not None:
            self._before_step(batches, full_length=self.collator.full_length)
        return batches, num_items

    # Evaluation

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Loss per label over the evaluation data, and accuracy where there is one; no part of any step."""
        with phases.unannounced():
            found = evaluate(self.model, self.eval_dataset, self.collator, self.plan, self.args.device, self.processes)
            self.engine.evaluated(self.model)
        metrics = {"eval_loss": found.loss}
        if found.accuracy is not None:
            metrics["eval_accuracy"] = found.accuracy
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _load_best_model(self) -> None:
        """Take the weights of the best checkpoint, unless it was damaged since."""
        best = self._best_checkpoint()
        if best is None or not is_whole(best):
            self._tell(f"the best checkpoint, of step {self.state.best_global_step}, is damaged; the last weights stay")
            return
        self.state.best_model_checkpoint = str(best)
        if self.engine.keeps_shards:
            self.engine.load_weights(best, self.model)
        elif self.method.saves_adapters_only:
            self.method.load(self.model, best)
        else:
            super()._load_best_model()
        self.has_best_weights = True

    def _best_checkpoint(self) -> Path | None:
        step = self.state.best_global_step
        return Path(self.args.output_dir) / f"checkpoint-{step}" if step else None

    # Saving

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint whole or not at all; the previous one stays until then."""
        name = f"checkpoint-{self.state.global_step}"
        output = Path(self.args.output_dir)
        with (
            saving(f"checkpoint of step {self.state.global_step}"),
            explain_lost_processes(self.processes),
            self.processes.writing(output / name) as partial,
        ):
            self._save_into = partial
            try:
                # Past TRL's method, which writes a model card, to the one that writes <run directory>/<name>.
                Trainer._save_checkpoint(self, model, trial)
            finally:
                self._save_into = None
            self.processes.wait()
            if self.processes.is_first:
                self._save_besides(partial / name)
                for entry in (partial / name).iterdir():
                    entry.rename(partial / entry.name)
                (partial / name).rmdir()
        if self._keep and self.processes.is_first:
            keep_newest(output, self._keep, besides=self._best_checkpoint())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model within a checkpoint; of several processes the weights are with the optimizer's state."""
        if not self.engine.keeps_shards:
            super().save_model(output_dir, _internal_call)
        elif self.processes.is_first:
            directory = Path(output_dir or self.args.output_dir)
            directory.mkdir(parents=True, exist_ok=True)
            self.model.config.save_pretrained(directory)
            cast(Any, self.processing_class).save_pretrained(directory)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.engine.keeps_shards:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self.engine.save(Path(output_dir), self.model, self.plan_optimizer)
        if self.processes.is_first:
            torch.save(cast(Any, self.lr_scheduler).state_dict(), Path(output_dir) / SCHEDULER)

    def _save_besides(self, directory: Path) -> None:
        """What transformers does not know: where the best checkpoint will lie, the losses' scale, the method's own."""
        self.method.save_besides(self.model, directory)
        if (best := self._best_checkpoint()) is not None:
            self.state.best_model_checkpoint = str(best)
            self.state.save_to_json(str(directory / "trainer_state.json"))
        if self._scaler is not None:
            (directory / LOSS_SCALE).write_text(json.dumps(self._scaler.state_dict()), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The weights of a checkpoint, or what the method keeps in their place; of several processes they come later.

        Those are written and read together with the optimizer's state.
        """
        if self.engine.keeps_shards:
            return
        if self.method.saves_adapters_only:
            self.method.load(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The optimizer's and scheduler's state, and the scale of losses."""
        if checkpoint is not None and self.engine.keeps_shards:
            self.engine.load(Path(checkpoint), self.model, self.plan_optimizer)
            state = torch.load(Path(checkpoint) / SCHEDULER, weights_only=True)
            cast(Any, self.lr_scheduler).load_state_dict(state)
            return
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._scaler is not None and checkpoint is not None:
            self._scaler.load_state_dict(json.loads((Path(checkpoint) / LOSS_SCALE).read_text(encoding="utf-8")))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._save_into or super()._get_output_dir(trial))

"""Hugging Face's trainers, running a plan: the step, its loss, optimizer and checkpointing are those that the planner
rehearses."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from accelerate import skip_first_batches
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from trl import SFTTrainer

from badam import phases
from badam.plan import Plan
from badam.profiling.memory.states import unwrap
from badam.training.build import build_optimizer, prepare_checkpointing
from badam.training.data.batches import Collator, EpochSampler
from badam.training.engines import Engine, engine_of
from badam.training.evaluation import evaluate
from badam.training.loading import load_saved_weights
from badam.training.memory_limit import MicroBatches, is_refusal
from badam.training.methods import method_of
from badam.training.processes import Processes, explain_lost_processes
from badam.training.run_directory import is_whole, keep_newest, saving
from badam.training.step import Batch, train_step
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


class PlanTrainer(Trainer):
    """Trains one model under one plan.

    Hugging Face's Trainer schedules the learning rate, logs, evaluates, saves and resumes. What decides memory is
    replaced: the step, optimizer, checkpointing and batches. As it is, it trains a classification on data that is
    tokenized already (badam.training.data.classes).

    Args:
        plan: what to run.
        collator: makes batches of the plan's size.
        padding: ``plan`` pads every batch to the plan's length, ``longest`` to its longest example, ``auto`` to the
            plan's length for the first steps of each visit.
        before_step: called with the micro-batches of each optimizer step.
        keep: checkpoints to keep, besides the best one; None keeps all.
        tell: called with sentences for the user.
        adapt: go on with smaller micro-batches when memory runs out before the update.
        processes: those that run the plan together; this one alone by default.
        engine: what the plan's engine does otherwise.
        options: for Trainer.
    """

    control: TrainerControl
    _tr_loss: Tensor  # transformers', which logs it after every step
    optimizer: torch.optim.Optimizer | None  # the plan's or what its engine drives it by, once training has begun

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
        self.accelerator.prepare_optimizer = lambda optimizer, *_, **__: optimizer
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
        """The plan's optimizer itself."""
        assert self.optimizer is not None, "training has begun, so there is an optimizer"
        return unwrap(self.optimizer)

    # The loop

    def _run_epoch(
        self,
        *,
        epoch: int,
        train_dataloader: DataLoader[Any],
        steps_in_epoch: int,
        num_update_steps_per_epoch: int,
        resume_from_checkpoint: str | None,
        epochs_trained: int,
        steps_trained_in_current_epoch: int,
        start_time: float,
        **_: Any,
    ) -> None:
        """The steps of one epoch, in place of transformers' own, whose step is another; of a resumed one the rest.

        What transformers does around a step stays: learning rate, logging, evaluation, checkpoints.
        """
        if self.state.global_step >= self.state.max_steps:  # the run that is resumed had made all its steps
            self.control.should_training_stop = True
            return
        accumulation = self.args.gradient_accumulation_steps
        resumes = epoch == epochs_trained and resume_from_checkpoint is not None
        done = steps_trained_in_current_epoch if resumes else 0  # in micro-batches
        if resumes and not done:
            self._load_rng_state(resume_from_checkpoint)
        batches = iter(skip_first_batches(train_dataloader, done) if done else train_dataloader)
        learning_rate, norm = None, None
        self.model.train()
        for number in range(done // accumulation, num_update_steps_per_epoch):
            first = number * accumulation
            count = min(accumulation, steps_in_epoch - first)
            step_batches, num_items = self.get_batch_samples(batches, count, self.args.device)
            if done and first == done:
                self._load_rng_state(resume_from_checkpoint)
            self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
            norm = self._step(step_batches, num_items)
            learning_rate = self._get_learning_rate()
            self.lr_scheduler.step()
            self.state.global_step += 1
            self.state.epoch = epoch + (first + count) / steps_in_epoch
            self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
            self._maybe_log_save_evaluate(
                self._tr_loss, norm, self.model, None, epoch, None, start_time, learning_rate=learning_rate
            )
            if self.control.should_epoch_stop or self.control.should_training_stop:
                break
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        self._maybe_log_save_evaluate(
            self._tr_loss, norm, self.model, None, epoch, None, start_time, learning_rate=learning_rate
        )

    def _step(self, batches: list[Batch], num_items: Tensor | int) -> Tensor | None:
        """One optimizer step; where memory allows no whole micro-batches, and that was asked for, in smaller ones.

        Returns:
            The norm of the gradients, shape (); None where it is not known here. The loss is transformers' to log next.
        """
        assert self.optimizer is not None, "training has begun, so there is an optimizer"
        while True:
            pieces = batches if self.micro_batches is None else self.micro_batches.pieces(batches)
            loss, norms = torch.zeros((), device=self.args.device), list[Tensor]()
            next_piece = functools.partial(self._next_piece, pieces, num_items)
            try:
                train_step(
                    self.plan,
                    self.method,
                    cast("PreTrainedModel", self.model),
                    self.optimizer,
                    next_piece,
                    micro_batches=len(pieces),
                    engine=self.engine,
                    scaler=self._scaler,
                    on_loss=functools.partial(_add, loss),
                    on_norm=norms.append,
                )
            except RuntimeError as error:
                if not self._can_go_on(error):
                    raise
                phase = phases.current()
            else:
                self._tr_loss = loss  # not added: what was logged is subtracted there, which leaves NaN what it is
                self.steps_made += 1
                return norms[0] if norms else None
            self._make_smaller(phase)  # out of the handler, whose traceback held the graph

    def _next_piece(self, pieces: list[Batch], num_items: Tensor | int) -> tuple[Batch, Tensor | int]:
        """The first of ``pieces``, which are from then on without it, on the device."""
        return {name: tensor.to(self.args.device) for name, tensor in pieces.pop(0).items()}, num_items

    def _can_go_on(self, error: RuntimeError) -> bool:
        """Whether a step can begin anew: an allocation was refused before the update, and there is what to halve."""
        in_update = phases.current() in (Phase.STEP, Phase.SWITCH)
        return self.micro_batches is not None and self.micro_batches.can_halve and is_refusal(error) and not in_update

    def _make_smaller(self, phase: Phase) -> None:
        """Halve micro-batches, and forget the gradients of the step so far, which are a torso."""
        micro = self.micro_batches
        assert micro is not None, "it was asked for"
        micro.halve()
        self.method.discard_gradients(self.model, self.plan_optimizer)
        phases.enter(Phase.SETUP)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._tell(
            f"out of memory in {phase} of step {self.state.global_step + 1}: from here on {micro.parts} "
            f"micro-batches of {micro.rows} in place of each of {self.plan.training.batch_size}"
        )

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
        if self.engine.is_for_several:
            self.engine.load_weights(best, self.model)
        elif self.method.saves_adapters_only:
            self.method.load(self.model, best)
        else:
            load_saved_weights(cast("PreTrainedModel", self.model), best)
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
        if not self.engine.is_for_several:
            super().save_model(output_dir, _internal_call)
        elif self.processes.is_first:
            directory = Path(output_dir or self.args.output_dir)
            directory.mkdir(parents=True, exist_ok=True)
            self.model.config.save_pretrained(directory)
            cast(Any, self.processing_class).save_pretrained(directory)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.engine.is_for_several:
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
        if self.engine.is_for_several:
            return
        if self.method.saves_adapters_only:
            self.method.load(self.model, Path(resume_from_checkpoint))
        else:
            load_saved_weights(cast("PreTrainedModel", self.model), Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The optimizer's and scheduler's state, and the scale of losses."""
        if checkpoint is not None and self.engine.is_for_several:
            self.engine.load(Path(checkpoint), self.model, self.plan_optimizer)
            state = torch.load(Path(checkpoint) / SCHEDULER, weights_only=True)
            cast(Any, self.lr_scheduler).load_state_dict(state)
            return
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._scaler is not None and checkpoint is not None:
            self._scaler.load_state_dict(json.loads((Path(checkpoint) / LOSS_SCALE).read_text(encoding="utf-8")))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._save_into or super()._get_output_dir(trial))


def _add(total: Tensor, micro_loss: Tensor) -> None:
    total.add_(micro_loss.detach())


class LanguageModelTrainer(PlanTrainer, SFTTrainer):
    """Trains a language model on data that is tokenized already (badam.training.data.tokens).

    Args:
        options: see PlanTrainer, and for TRL's SFTTrainer.
    """

    def __init__(self, **options: Any) -> None:
        text_config = options["model"].config.get_text_config()
        returns_router_logits = getattr(text_config, "output_router_logits", None)
        super().__init__(**options)
        if returns_router_logits is not None:
            # TRL adds the load-balancing loss of a mixture of experts whatever the configuration says. The plan was
            # made for what it says, and a chunked loss has no place for another.
            text_config.output_router_logits = self.aux_loss_enabled = returns_router_logits
        # TRL sets a forward of its own on the model, for its fused head; ours is called as the rehearsal calls it.
        self.model.__dict__.pop("forward", None)

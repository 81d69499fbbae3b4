"""Connects Hugging Face's loop with the recorder, the display and the wish to stop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from badam import phases
from badam.profiling.memory.source import StepMemory
from badam.profiling.recorder import Recorder
from badam.training.interruption import Interruption
from badam.training.progress import EvaluationView, MetricsFile, ProgressDisplay, StepView
from badam.vocabulary import Phase

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from badam.training.trainer import PlanTrainer


class RunCallback(TrainerCallback):
    """Records each optimizer step and shows it.

    Args:
        trainer: for the order of the data.
        recorder: already started.
        display, metrics, evaluations: where steps and evaluations are shown and written.
        interruption: asked after each step whether to save and stop.
        block_names: by index.
    """

    def __init__(
        self,
        trainer: PlanTrainer,
        recorder: Recorder,
        display: ProgressDisplay,
        metrics: MetricsFile,
        evaluations: MetricsFile,
        interruption: Interruption,
        block_names: Sequence[str],
    ) -> None:
        self._trainer = trainer
        self._recorder = recorder
        self._display = display
        self._metrics = metrics
        self._evaluations = evaluations
        self._interruption = interruption
        self._block_names = block_names
        self._block = 0
        self._peak_bytes = 0
        self._tokens = 0
        self._since = 0.0
        recorder.on_step(self._step_recorded)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Model, optimizer and resumed state are complete: begin to record."""
        model: nn.Module = kwargs["model"]
        phases.enter(Phase.SETUP)
        self._recorder.attach(model, kwargs["optimizer"])
        self._since = time.perf_counter()
        self._display.start()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw this epoch's order of the data; a resumed epoch is in its middle."""
        self._trainer.begin_epoch(int(state.epoch or 0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The gradients are released: the step is over."""
        phases.enter(Phase.SETUP)
        if self._trainer.processes.count > 1:
            self._interruption.spread(self._trainer.processes)
        if self._interruption.signal is not None:
            control.should_save = True
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """One optimizer step's loss is known."""
        if not logs or "loss" not in logs:
            return
        now = time.perf_counter()
        tokens, self._tokens = self._trainer.collator.tokens - self._tokens, self._trainer.collator.tokens
        live_bytes, peak_bytes = self._recorder.live_bytes, self._peak_bytes
        if (processes := self._trainer.processes).count > 1:  # of all cards: the most that one holds, tokens together
            live_bytes, peak_bytes = (int(number) for number in processes.most(live_bytes, peak_bytes))
            tokens = int(processes.sums(tokens)[0])
        self._recorder.note(loss=logs["loss"], tokens=tokens)
        norm = self._trainer.engine.gradient_norm()
        view = StepView(
            step=state.global_step,
            loss=logs["loss"],
            learning_rate=logs["learning_rate"],
            gradient_norm=logs.get("grad_norm") if norm is None else norm,
            block=self._block_names[self._block],
            tokens_per_second=tokens / (now - self._since),
            live_bytes=live_bytes,
            peak_bytes=peak_bytes,
        )
        self._since = now
        self._display.show(view)
        self._metrics.append(view)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """The loss on the evaluation data is known."""
        found = metrics or {}
        view = EvaluationView(step=state.global_step, loss=found["eval_loss"], accuracy=found.get("eval_accuracy"))
        self._display.show_evaluation(view)
        self._evaluations.append(view)
        self._leave_out()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A checkpoint was written."""
        self._leave_out()

    def _leave_out(self) -> None:
        """What happened since the step's loss was logged is no part of the next step."""
        now = time.perf_counter()
        self._recorder.leave_out(now - self._since)
        self._since = now

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop drawing; the recorder is stopped by whoever started it."""
        self._display.stop()

    def _step_recorded(self, block: int, memory: StepMemory | None) -> None:
        self._block = block
        if memory is not None:
            self._peak_bytes = max(self._peak_bytes, memory.peak_bytes)

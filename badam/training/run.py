"""One training run from beginning to end: plan and data in, model, checkpoints and measurement out."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback

from badam.block_optimizer import BlockOptimizer
from badam.errors import InputError
from badam.plan import Plan, save_record
from badam.profiling.record import MeasuredRun
from badam.profiling.recorder import Recorder
from badam.training.arguments import marks_assistant, training_arguments
from badam.training.assemble import build_model, prepare_model
from badam.training.batches import LengthReport, enforce_length
from badam.training.callbacks import RunCallback
from badam.training.checkpoints import (
    MODEL_DIRECTORY,
    check_space,
    newest_whole,
    prepare_output,
    saving,
    step_of,
    written_whole,
)
from badam.training.coverage import coverage
from badam.training.data import TrainingData
from badam.training.inputs import load_inputs
from badam.training.interruption import Interruption
from badam.training.methods import method_of
from badam.training.options import RunOptions
from badam.training.out_of_memory import explained
from badam.training.progress import MetricsFile, ProgressDisplay
from badam.training.trainer import PlanTrainer
from badam.training.weights import locate_weights, tokenizer_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MEASURED, PLAN, METRICS = "measured.json", "plan.json", "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run left behind."""

    measured: MeasuredRun
    measured_path: Path
    model_path: Path | None  # None if the run was stopped before its end
    stopped_by: signal.Signals | None
    step: int


def run_plan(plan: Plan, options: RunOptions, console: Console, *, command: str | None = None) -> RunResult:
    """Train under ``plan``.

    Args:
        plan: what to run; method and engine must be ones that this process can run.
        options: data, output, length of the run.
        console: for progress and notes.
        command: recorded as what started the run.

    Raises:
        InputError: for anything that can be wrong with the options, data, weights or the disk.
        OutOfMemory: if the device refuses an allocation.
    """
    device = _device(plan)
    _check_runnable(plan, device)
    prepare_output(options.output_dir, resume=options.resume)
    checkpoint = _checkpoint_to_resume(options)
    weights = None if checkpoint else locate_weights(plan.model, options.init)
    tokenizer_from = str(checkpoint) if checkpoint else tokenizer_source(plan.model, weights)
    tokenizer, data = load_inputs(plan, options, tokenizer_from)
    _tell(console, f"data: {data.description}" + (f"; {data.skipped:,} skipped" if data.skipped else ""))
    with ExitStack() as stack:
        stack.enter_context(_own_display())
        recorder = Recorder(device, every_step=False)
        recorder.start()
        stack.callback(recorder.stop)
        model = _model(plan, options, weights)
        trainer, lengths = _trainer(plan, options, model, tokenizer, data, recorder)
        _tell(console, f"lengths: {lengths}")
        total_steps = _total_steps(trainer, options)
        if total_steps == 0:
            raise InputError("The run has no optimizer step.", advice="Ask for some with --max-steps or --epochs.")
        if checkpoint is not None and step_of(checkpoint) >= total_steps:
            raise InputError(
                f"The run in {options.output_dir} has had {step_of(checkpoint)} of {total_steps} steps already.",
                advice=f"Its weights are in {checkpoint}. Ask for more steps with --max-steps or --epochs.",
            )
        check_space(options.output_dir, _bytes_to_write(model, options))
        _warn(plan, device, total_steps, console)
        display = ProgressDisplay(console, total_steps, _planned_bytes(plan))
        metrics = MetricsFile(options.output_dir / METRICS)
        stack.callback(metrics.close)
        stack.callback(display.stop)
        interruption = stack.enter_context(Interruption())
        names = [block.name for block in plan.partition.blocks]
        trainer.add_callback(RunCallback(trainer, recorder, display, metrics, interruption, names))
        save_record(plan, options.output_dir / PLAN)
        with explained(plan):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        recorder.stop()
        measured = recorder.measured_run(plan, command=command)
        save_record(measured, options.output_dir / MEASURED)
        model_path = None if interruption.signal else _save_model(trainer, options.output_dir)
        _release(trainer)
    return RunResult(
        measured, options.output_dir / MEASURED, model_path, interruption.signal, int(trainer.state.global_step)
    )


def _check_runnable(plan: Plan, device: torch.device) -> None:
    method = method_of(plan.method)
    method.check(plan)
    method.check_device(device)
    if plan.target.engine != "single":
        raise InputError(
            f"badam-train runs on one device; the plan is for {plan.target.num_gpus} under {plan.target.engine}.",
            advice="Plan with --engine single.",
        )
    if plan.model.task != "causal-lm":
        raise InputError(
            f"badam-train trains causal language models; the plan is for {plan.model.task}.",
            advice="Use BlockOptimizer with transformers' Trainer for this task.",
        )


def _checkpoint_to_resume(options: RunOptions) -> Path | None:
    if not options.resume:
        return None
    checkpoint = newest_whole(options.output_dir)
    if checkpoint is None:
        raise InputError(
            f"There is no whole checkpoint in {options.output_dir} to resume from.",
            advice="Start without --resume, in an empty directory.",
        )
    return checkpoint


def _device(plan: Plan) -> torch.device:
    if plan.target.gpu != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _model(plan: Plan, options: RunOptions, weights: str | None) -> PreTrainedModel:
    set_seed(options.seed)
    try:
        model = build_model(plan.model, plan.training, weights=weights)
    except (OSError, ValueError, RuntimeError) as error:
        if weights is None or isinstance(error, torch.OutOfMemoryError):
            raise
        raise InputError(
            f"The weights in {weights} cannot be loaded into the plan's model: {error}",
            advice="Plan for the model that the weights belong to, or start with --init random.",
        ) from error
    prepare_model(model, plan)
    return model


def _trainer(
    plan: Plan,
    options: RunOptions,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TrainingData,
    recorder: Recorder,
) -> tuple[PlanTrainer, LengthReport]:
    trainer = PlanTrainer(
        plan=plan,
        model=model,
        args=training_arguments(plan, options, recorder.device, assistant_only=marks_assistant(data, tokenizer)),
        dataset=data.dataset,
        tokenizer=tokenizer,
        padding=options.padding,
        before_step=recorder.next_step,
        keep=options.keep,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train_dataset, lengths = enforce_length(trainer.train_dataset, plan.training.seq_len, options.on_long)
    return trainer, lengths


@contextmanager
def _own_display() -> Iterator[None]:
    """No progress bars of libraries between ours."""
    import datasets
    from transformers.utils import logging

    shown = not datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown[0]:
            datasets.enable_progress_bars()
        if shown[1]:
            logging.enable_progress_bar()


def _total_steps(trainer: PlanTrainer, options: RunOptions) -> int:
    if options.max_steps:
        return options.max_steps
    training = trainer.plan.training
    batches = -(-len(trainer.train_dataset) // training.batch_size)
    return int(-(-options.epochs * max(1, -(-batches // training.grad_accum)) // 1))


def _bytes_to_write(model: PreTrainedModel, options: RunOptions) -> int:
    """The model at the end, and one checkpoint, whose weights are most of it."""
    return int(model.get_memory_footprint()) * (2 if options.save_steps else 1)


def _planned_bytes(plan: Plan) -> int | None:
    return plan.prediction.peak_allocated_bytes if plan.prediction else None


def _tell(console: Console, text: str) -> None:
    """One line as it is: nothing coloured by guessing, nothing broken at a width."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _warn(plan: Plan, device: torch.device, total_steps: int, console: Console) -> None:
    if device.type == "cpu" and plan.target.gpu != "cpu":
        _tell(
            console, f"note: the plan is for {plan.target.gpu}; this machine has no CUDA device, so it runs on the CPU."
        )
    warning = None if plan.method == "lisa" else coverage(plan, total_steps).warning()
    if warning:
        _tell(console, f"warning: {warning}")


def _save_model(trainer: PlanTrainer, output_dir: Path) -> Path:
    """The trained model with its tokenizer, ready for from_pretrained."""
    trainer.method.finish(trainer.model, trainer.plan_optimizer)
    target = output_dir / MODEL_DIRECTORY
    with saving("trained model"), written_whole(target) as partial:
        trainer.model.save_pretrained(partial)
        trainer.processing_class.save_pretrained(partial)
    return target


def _release(trainer: PlanTrainer) -> None:
    """Let go of the last block: autograd's hooks on its parameters would keep masters and moments for ever."""
    optimizer = trainer.plan_optimizer
    if isinstance(optimizer, BlockOptimizer):
        for active in optimizer.active_parameters:
            active.close()
    optimizer.state.clear()

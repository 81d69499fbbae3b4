"""One training run from beginning to end: plan and data in, model, checkpoints and measurement out."""

from __future__ import annotations

import functools
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from transformers import set_seed

from badam.blocks.schedule import coverage
from badam.errors import BadamError, InputError
from badam.optim.block import BlockOptimizer
from badam.plan import Plan, record_digest, save_record
from badam.profiling.record import MeasuredRun, load_measured, of_all_gpus
from badam.profiling.recorder import Recorder
from badam.tensors.dtensor import shape_of
from badam.training.build import prepare_model
from badam.training.data.dataset import in_directory
from badam.training.data.inputs import load_inputs
from badam.training.engines import Engine, check_kind, engine_of
from badam.training.interruption import Interruption
from badam.training.memory_limit import explained
from badam.training.methods import method_of
from badam.training.options import RunOptions
from badam.training.processes import Processes, explain_lost_processes, join_processes, shared_options, shared_plan
from badam.training.progress import MetricsFile, ProgressDisplay
from badam.training.run_callback import RunCallback
from badam.training.run_directory import (
    MODEL_DIRECTORY,
    check_space,
    is_whole,
    newest_whole,
    prepare_output,
    removed_if_unused,
    saving,
    step_of,
    written_whole,
)
from badam.training.setup import prepare_trainer
from badam.training.tasks import TRAINED_HERE
from badam.training.trainer import PlanTrainer
from badam.training.weights import locate_weights, tokenizer_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEASURED, PLAN = "measured.json", "plan.json"
METRICS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run left behind."""

    measured: MeasuredRun | None  # None if the run that was resumed had made all steps, and nothing is known of them
    measured_path: Path
    model_path: Path | None  # None if the run was stopped before its end
    stopped_by: signal.Signals | None
    step: int
    is_main_process: bool = True  # whether this process is the one of several that tells the user
    best: BestEvaluation | None = None  # where the model's weights are those of the best evaluation


@dataclass(frozen=True, slots=True)
class BestEvaluation:
    """The evaluation that the saved model had the best figure in."""

    step: int
    figure: float  # loss, or accuracy of a classification


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
    options.check()
    _check_runnable(plan, options, device)
    processes = join_processes(plan, options, device)
    with ExitStack() as stack, explain_lost_processes(processes):
        interruption = stack.enter_context(Interruption())
        options, console = shared_options(options, console, processes)
        if processes.is_first:
            stack.enter_context(removed_if_unused(options.output_dir))
        stack.callback(shutil.rmtree, options.data_directory, ignore_errors=True)
        if processes.count not in (1, plan.target.num_gpus):
            planned, plan = plan, shared_plan(plan, processes)
            _tell(
                console,
                f"note: the plan is for {planned.target.num_gpus} cards; these are {processes.count}, which make the "
                f"same steps of {plan.training.grad_accum} micro-batches each and need other memory than planned.",
            )
        return _run(plan, options, console, command, processes, interruption)


def _run(
    plan: Plan,
    options: RunOptions,
    console: Console,
    command: str | None,
    processes: Processes,
    interruption: Interruption,
) -> RunResult:
    device, engine = _device(plan), engine_of(plan)
    processes.first(lambda: prepare_output(options.output_dir, resume=options.resume))
    checkpoint = processes.first(lambda: _checkpoint_to_resume(options, engine))
    has_all = checkpoint is not None and not method_of(plan.method).saves_adapters_only
    weights = None if has_all else locate_weights(plan.model, options.init)
    tokenizer_from = str(checkpoint) if checkpoint else tokenizer_source(plan.model, weights)
    with ExitStack() as stack:
        stack.enter_context(_own_display())
        inputs = load_inputs(plan, options, tokenizer_from)
        for data in (inputs.training, inputs.evaluation):
            if data is not None:
                _tell(console, f"data: {data.description}" + (f"; {data.skipped:,} skipped" if data.skipped else ""))
                for note in data.notes:
                    _tell(console, f"      {note}")
        recorder = Recorder(device, every_step=False, profile=options.profile)
        recorder.start()
        stack.callback(_save_profile, recorder, plan, options, console)  # also of a run that memory has ended
        stack.callback(recorder.stop)
        tell = functools.partial(_tell, console)
        model = _model(plan, options, weights, engine, tell, resumes=has_all)
        engine.place(model)
        with in_directory(options.data_directory):
            prepared = prepare_trainer(plan, options, model, inputs, recorder, tell, processes=processes, engine=engine)
        trainer = prepared.trainer
        _tell(console, f"lengths: {prepared.sentence}")
        total_steps = _total_steps(trainer, options, checkpoint)
        needed_bytes = _bytes_to_write(plan, model, options)
        processes.first(lambda: check_space(options.output_dir, needed_bytes))
        _warn(plan, device, total_steps, console)
        interruption.postpone()
        trainer.add_callback(_callback(stack, trainer, options, recorder, interruption, console, total_steps))
        processes.first(lambda: save_record(plan, options.output_dir / PLAN))
        with explained(plan):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        recorder.stop()
        measured = _save_measured(trainer, recorder, command, options.output_dir / MEASURED)
        stopped_by = interruption.signal if trainer.state.global_step < total_steps else None
        model_path = None if stopped_by else _save_model(trainer, options.output_dir)
        _release(trainer)
        processes.wait()  # a launcher ends those that are at work still when one ends with a signal's exit code
    return RunResult(
        measured,
        options.output_dir / MEASURED,
        model_path,
        stopped_by,
        int(trainer.state.global_step),
        processes.is_first,
        _best(trainer),
    )


def _callback(
    stack: ExitStack,
    trainer: PlanTrainer,
    options: RunOptions,
    recorder: Recorder,
    interruption: Interruption,
    console: Console,
    total_steps: int,
) -> RunCallback:
    """What follows the run; its display and files are closed with ``stack``."""
    display = ProgressDisplay(console, total_steps, _planned_bytes(trainer.plan))
    file = trainer.processes.file
    metrics, evaluations = (MetricsFile(file(options.output_dir / name)) for name in (METRICS, EVALUATIONS))
    for close in (metrics.close, evaluations.close, display.stop):
        stack.callback(close)
    names = [block.name for block in trainer.plan.partition.blocks]
    return RunCallback(trainer, recorder, display, metrics, evaluations, interruption, names)


def _save_measured(trainer: PlanTrainer, recorder: Recorder, command: str | None, path: Path) -> MeasuredRun | None:
    """Write what was measured; where no step was made, what the run before has left is all there is."""
    processes = trainer.processes
    if trainer.steps_made == 0:
        return load_measured(path) if path.exists() else None
    measured = of_all_gpus(processes.gathered(_measured(trainer, recorder, command)))
    processes.first(lambda: save_record(measured, path))
    return measured


def _measured(trainer: PlanTrainer, recorder: Recorder, command: str | None) -> MeasuredRun:
    """What was measured, with the micro-batches that memory allowed."""
    measured = recorder.measured_run(trainer.plan, command=command)
    micro, training = trainer.micro_batches, trainer.plan.training
    if micro is None or micro.parts == 1:
        return measured
    adapted = {"batch_size": micro.rows, "grad_accum": training.grad_accum * micro.parts}
    return measured.model_copy(update={"training": training.model_copy(update=adapted)})


def _save_profile(recorder: Recorder, plan: Plan, options: RunOptions, console: Console) -> None:
    names = [block.name for block in plan.partition.blocks]
    for path in recorder.save_profile(options.output_dir, names, record_digest(plan)):
        _tell(console, f"profile: {path}")


def _best(trainer: PlanTrainer) -> BestEvaluation | None:
    state = trainer.state
    if not trainer.has_best_weights or state.best_global_step is None or state.best_metric is None:
        return None
    return BestEvaluation(state.best_global_step, state.best_metric)


def _check_runnable(plan: Plan, options: RunOptions, device: torch.device) -> None:
    if plan.model.task not in TRAINED_HERE:
        raise InputError(
            f"badam-train trains language models and classifiers of texts; this plan is for {plan.model.task}.",
            advice="Train it in a loop of your own with badam.BlockOptimizer and badam.training.losses.forward_loss; "
            "badam.profiling.record(optimizer, model, plan=plan) measures it.",
        )
    method = method_of(plan.method)
    method.check(plan)
    method.check_device(device)
    if options.adapt and not method.accumulates:
        raise InputError(
            f"{plan.method} updates weights inside backward, so a step cannot begin anew with smaller micro-batches.",
            advice="Leave --adapt out, or plan with a smaller --batch-size.",
        )


def _checkpoint_to_resume(options: RunOptions, engine: Engine) -> Path | None:
    if not options.resume:
        return None
    checkpoint = newest_whole(options.output_dir)
    if checkpoint is None:
        raise InputError(
            f"There is no complete checkpoint in {options.output_dir} to resume from.",
            advice="Start without --resume, in an empty directory.",
        )
    check_kind(checkpoint, engine)
    return checkpoint


def _device(plan: Plan) -> torch.device:
    if plan.target.gpu != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _model(
    plan: Plan,
    options: RunOptions,
    weights: str | None,
    engine: Engine,
    tell: Callable[[str], None],
    *,
    resumes: bool,
) -> PreTrainedModel:
    set_seed(options.seed)
    loading = method_of(plan.method).loading_options(plan) if weights else None
    try:
        model = engine.build(weights, loading, resumes=resumes, tell=tell)
    except (OSError, ValueError, RuntimeError) as error:
        if weights is None or isinstance(error, (torch.OutOfMemoryError, BadamError)):
            raise
        raise InputError(
            f"The weights in {weights} cannot be loaded into the plan's model: {error}",
            advice="Plan for the model that the weights belong to, or start with --init random.",
        ) from error
    prepare_model(model, plan)
    return model


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


def _total_steps(trainer: PlanTrainer, options: RunOptions, checkpoint: Path | None) -> int:
    """Optimizer steps of the whole run.

    Raises:
        InputError: if there are none, or the run to resume has had them all and its model is there.
    """
    training = trainer.plan.training
    batches = -(-len(trainer.train_dataset) // (training.batch_size * trainer.args.world_size))
    total = options.max_steps or int(-(-options.epochs * max(1, -(-batches // training.grad_accum)) // 1))
    if total == 0:
        raise InputError("The run has no optimizer step.", advice="Ask for some with --max-steps or --epochs.")
    if checkpoint is not None and (done := step_of(checkpoint)) >= total:
        model = options.output_dir / MODEL_DIRECTORY
        if done > total or is_whole(model):
            raise InputError(
                f"The run in {options.output_dir} has had {done} of {total} steps already.",
                advice=f"Its model is in {model}. Ask for more steps with --max-steps or --epochs.",
            )
    return total


def _bytes_to_write(plan: Plan, model: PreTrainedModel, options: RunOptions) -> int:
    """The model at the end, and one checkpoint, whose weights are most of it."""
    saved: int = sum(math.prod(shape_of(each)) * each.itemsize for each in (*model.parameters(), *model.buffers()))
    if method_of(plan.method).saves_adapters_only:
        saved = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return saved * (2 if options.checkpoint_steps or options.keep_best else 1)


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
    if not trainer.has_best_weights:
        trainer.method.settle(trainer.plan_optimizer)
    trainer.method.finish(trainer.model)
    target = output_dir / MODEL_DIRECTORY
    weights = trainer.engine.whole_weights(trainer.model)
    if not trainer.processes.is_first:
        return target  # the first process writes it
    resumable = newest_whole(output_dir) is not None
    with saving("trained model", resumable=resumable), written_whole(target) as partial:
        trainer.model.save_pretrained(partial, **({} if weights is None else {"state_dict": weights}))
        trainer.processing_class.save_pretrained(partial)
    return target


def _release(trainer: PlanTrainer) -> None:
    """Let go of the last block: autograd's hooks on its parameters would keep masters and moments forever."""
    optimizer = trainer.plan_optimizer
    if isinstance(optimizer, BlockOptimizer):
        for active in optimizer.active_parameters:
            active.close()
    optimizer.state.clear()

"""What badam-train costs beyond the training itself, at the size of the demo.

Three ways to run the same steps of the same model on the same data, in turns, in one process:

* ``bare``: model, loss, optimizer and clipping in a loop of ten lines;
* ``trainer``: the same through TRL and Hugging Face's Trainer, as badam-train drives them, without measuring;
* ``measured``: with time recorded in every step and memory in those that can show a higher peak, as badam-train does;
* ``every step``: with memory recorded in every step, as ``badam.profiling.record`` does.

Times are processor seconds of this process per optimizer step, so that other work on the machine does not count.

    badam-plan badam/demo-llama-12m --gpu cpu --batch-size 4 --seq-len 128 --partition layer --switch-every 4
    python -m benchmarks.training_overhead plan.json [STEPS]
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import datasets
import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from badam import phases
from badam.plan import Plan, load_plan
from badam.profiling.recorder import Recorder
from badam.training.build import build_model, build_optimizer
from badam.training.data.batches import PlanCollator
from badam.training.data.inputs import load_inputs
from badam.training.losses import forward_loss
from badam.training.options import RunOptions
from badam.training.setup import training_arguments
from badam.training.trainer import LanguageModelTrainer
from badam.vocabulary import Phase

ROUNDS = 3
WARM_UP_STEPS = 3


class StepTimes(TrainerCallback):
    """Processor seconds between the ends of optimizer steps."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._since = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time since the previous step's end."""
        phases.enter(Phase.SETUP)
        now = time.process_time()
        self.seconds.append(now - self._since)
        self._since = now


def bare(plan: Plan, trainer: LanguageModelTrainer, steps: int) -> list[float]:
    """Seconds per step of a plain loop over the trainer's own batches."""
    model = build_model(plan.model, plan.training)
    optimizer = build_optimizer(model, plan)
    batches = iter(trainer.get_train_dataloader())
    seconds = []
    for _ in range(steps):
        begun = time.process_time()
        loss: Tensor = forward_loss(model, next(batches), plan.training.loss)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        del loss
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.training.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - begun)
    return seconds


def through_trainer(trainer: LanguageModelTrainer, recorder: Recorder | None) -> list[float]:
    """Seconds per step of the trainer."""
    times = StepTimes()
    trainer.add_callback(times)
    if recorder is not None:
        recorder.start()
        trainer.create_optimizer()
        recorder.attach(trainer.model, trainer.plan_optimizer)
    try:
        trainer.train()
    finally:
        if recorder is not None:
            recorder.stop()
    return times.seconds


def main() -> None:
    """Print one line per way."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    plan = load_plan(sys.argv[1])
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 24
    with tempfile.TemporaryDirectory() as directory:
        options = RunOptions(output_dir=Path(directory), max_steps=steps, padding="plan")
        inputs = load_inputs(plan, options, None)

        def trainer(recorder: Recorder | None = None) -> LanguageModelTrainer:
            arguments = training_arguments(plan, options, torch.device("cpu"))
            made = LanguageModelTrainer(
                plan=plan,
                model=build_model(plan.model, plan.training),
                args=arguments,
                train_dataset=inputs.training.dataset.select(range(steps * plan.training.batch_size)),
                processing_class=inputs.tokenizer,
                collator=PlanCollator(plan.training.seq_len, inputs.tokenizer.pad_token_id),
                padding="plan",
                before_step=recorder.next_step if recorder else None,
            )
            made.remove_callback(PrinterCallback)
            return made

        def recorded(*, every_step: bool) -> list[float]:
            recorder = Recorder(torch.device("cpu"), every_step=every_step)
            return through_trainer(trainer(recorder), recorder)

        ways: dict[str, Callable[[], list[float]]] = {
            "bare": lambda: bare(plan, trainer(), steps - 1),
            "trainer": lambda: through_trainer(trainer(), None),
            "measured": lambda: recorded(every_step=False),
            "every step": lambda: recorded(every_step=True),
        }
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, run in ways.items():
                found[name] += run()[WARM_UP_STEPS:]
    base = statistics.fmean(found["bare"])
    for name, seconds in found.items():
        mean = statistics.fmean(seconds)
        print(f"{name:12} {mean * 1e3:8.1f} ms per step  {mean / base - 1:+7.1%}  ({len(seconds)} steps)")


if __name__ == "__main__":
    main()

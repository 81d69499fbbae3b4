"""What measuring a run costs: equal runs, measured and not, in turns, in one process.

    python -m benchmarks.recording_overhead plan.json [ROUNDS]

The plan is for the CPU, where the allocator's reports come through torch's profiler and cost most; such as the demo's.
Its switches are set to the lengths of visits below. Processor time between the ends of optimizer steps counts, so that
data, recorder and callbacks are in it, and other work on the machine is not. Of each step the median over the rounds is
taken, and these are summed over the run: single disturbances do not count, rare expensive steps do.

Where the machine is busy the processor time of equal steps still differs by some percent. So one more run of each
length tells how much of its processor time was spent inside the recorder, which no disturbance hides; what it leaves
out is that a step runs slower while the allocator reports.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import torch
from torch import Tensor
from transformers.trainer_callback import PrinterCallback

from badam.plan import Plan, load_plan
from badam.profiling.machine import provenance, this_machine
from badam.profiling.memory.cpu import CpuMemory
from badam.profiling.memory.source import StepMemory
from badam.profiling.recorder import Recorder
from badam.training.build import build_model
from badam.training.data.batches import PlanCollator
from badam.training.data.inputs import Inputs, load_inputs
from badam.training.options import RunOptions
from badam.training.setup import training_arguments
from badam.training.trainer import LanguageModelTrainer
from badam.vocabulary import Phase, Profile
from benchmarks.training_overhead import through_trainer

RECORD = Path(__file__).parent / "results" / "recording_overhead.json"

CPU = torch.device("cpu")

WARM_UP_STEPS = 1
"""The first step of a process does what none does again."""


@dataclass(frozen=True, slots=True)
class MemorySetting:
    """One length of run, and what is compared over it."""

    name: str
    switch_every: int
    steps: int
    ways: tuple[Profile | None, ...] = (None, "normal")


SETTINGS = (
    MemorySetting("two visits of 50 steps", 50, 100),
    MemorySetting("the demo, 160 steps", 4, 160),
    MemorySetting("the demo cut to one block epoch", 4, 40, (None, "normal", "full")),
)


@dataclass(frozen=True, slots=True)
class Overhead:
    """What one setting showed. Shares are of the time without measuring."""

    name: str
    switch_every: int
    steps: int
    measured_steps: int
    step_milliseconds: float  # without measuring, mean over the run
    normal_share: float
    full_share: float | None
    measured_step_share: float  # of normal mode, by how much a measured step is longer than the same one unmeasured
    within_recorder_share: float  # of normal mode, of the processor time of a run


class TimedMemory(CpuMemory):
    """Measures as always, and adds up the processor time that it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def begin_step(self, batch: Iterable[Tensor]) -> None:
        """Timed."""
        with self._timed():
            super().begin_step(batch)

    def phase_begins(self, phase: Phase) -> None:
        """Timed."""
        with self._timed():
            super().phase_begins(phase)

    def end_step(self, *, pause: bool) -> StepMemory:
        """Timed."""
        with self._timed():
            return super().end_step(pause=pause)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        begun = time.process_time()
        yield
        self.seconds += time.process_time() - begun


def within_recorder(setting: MemorySetting, plan: Plan, inputs: Inputs, directory: Path) -> float:
    """The share of a run's processor time that measuring memory takes."""
    memory = TimedMemory()
    recorder = Recorder(CPU, every_step=False, memory=memory)
    options = RunOptions(output_dir=directory, max_steps=setting.steps)
    seconds = through_trainer(trainer_of(with_visits(plan, setting), options, inputs, recorder), recorder)
    return memory.seconds / (sum(seconds) - memory.seconds)


def with_visits(plan: Plan, setting: MemorySetting) -> Plan:
    """The plan with visits of that length."""
    schedule = plan.schedule.model_copy(update={"switch_every": setting.switch_every})
    return plan.model_copy(update={"schedule": schedule})


def trainer_of(plan: Plan, options: RunOptions, inputs: Inputs, recorder: Recorder | None) -> LanguageModelTrainer:
    """The trainer of one run, over the same examples in the same order each time."""
    torch.manual_seed(0)
    pad_token_id = inputs.tokenizer.pad_token_id
    assert isinstance(pad_token_id, int), "the tokenizer was prepared"
    trainer = LanguageModelTrainer(
        plan=plan,
        model=build_model(plan.model, plan.training),
        args=training_arguments(plan, options, CPU),
        train_dataset=inputs.training.dataset,
        processing_class=inputs.tokenizer,
        collator=PlanCollator(plan.training.seq_len, pad_token_id),
        padding="auto",
        before_step=recorder.next_step if recorder else None,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def overhead(setting: MemorySetting, plan: Plan, inputs: Inputs, rounds: int, directory: Path) -> Overhead:
    """Measure one setting."""
    options = RunOptions(output_dir=directory, max_steps=setting.steps)
    found: dict[Profile | None, list[list[float]]] = {way: [] for way in setting.ways}
    picked: list[bool] = []
    for turn in range(rounds):
        first = turn % len(setting.ways)  # none always follows the same other
        for way in setting.ways[first:] + setting.ways[:first]:
            recorder = Recorder(CPU, every_step=False, profile=way) if way else None
            found[way].append(
                through_trainer(trainer_of(with_visits(plan, setting), options, inputs, recorder), recorder)
            )
            if recorder is not None:
                picked = [step.memory is not None for step in recorder.log.steps]
    steps = {
        way: [statistics.median(times) for times in zip(*runs, strict=True)][WARM_UP_STEPS:]
        for way, runs in found.items()
    }
    base, measured = sum(steps[None]), [index for index, was in enumerate(picked[WARM_UP_STEPS:]) if was]
    longer = sum(steps["normal"][index] for index in measured) / sum(steps[None][index] for index in measured)
    return Overhead(
        setting.name,
        setting.switch_every,
        setting.steps,
        sum(picked),
        1e3 * base / len(steps[None]),
        sum(steps["normal"]) / base - 1,
        sum(steps["full"]) / base - 1 if "full" in steps else None,
        longer - 1,
        within_recorder(setting, plan, inputs, directory),
    )


def main() -> None:
    """Measure every setting, print a line for each and write the record."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    plan = load_plan(sys.argv[1])
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    results = []
    with tempfile.TemporaryDirectory() as directory:
        inputs = load_inputs(plan, RunOptions(output_dir=Path(directory)), None)
        for setting in SETTINGS:
            result = overhead(setting, plan, inputs, rounds, Path(directory))
            results.append(asdict(result))
            full = "" if result.full_share is None else f"full {result.full_share:+.1%}  "
            print(
                f"{result.name:34} {result.step_milliseconds:6.1f} ms per step  normal {result.normal_share:+6.1%}  "
                f"{full}{result.measured_steps} of {result.steps} steps measured, "
                f"each {result.measured_step_share:+.0%}, {result.within_recorder_share:.1%} inside the recorder",
                flush=True,
            )
    record = {
        "model": plan.model.id,
        "blocks": len(plan.partition.blocks),
        "rounds": rounds,
        "settings": results,
        "machine": this_machine(CPU).model_dump(),
        "provenance": provenance(f"python -m benchmarks.recording_overhead plan.json {rounds}").model_dump(),
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Records a training run: peak memory and seconds by phase and block.

In a loop of your own, around everything from building the optimizer on::

    with badam.profiling.record(optimizer, model, plan=plan) as run:
        for batch in batches:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.note(loss=loss.item(), tokens=batch["input_ids"].numel())
    run.save("measured.json")

badam-train uses the same recorder, started before the model is built.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from badam import phases
from badam.errors import BadamError
from badam.plan import Plan, record_digest, save_record
from badam.profiling.clocks import CudaClock, PhaseClock, WallClock
from badam.profiling.machine import provenance, this_machine
from badam.profiling.memory.source import MemorySource, StepMemory
from badam.profiling.memory.states import ModelStates
from badam.profiling.modules.profile import FullProfile
from badam.profiling.record import MeasuredRun
from badam.profiling.selection import StepSelection
from badam.profiling.summary import RunLog, StepRecord, summarize
from badam.vocabulary import Phase, Profile


class Recorder:
    """Follows the phases that the training code announces, and measures each optimizer step.

    Call :meth:`start`, then :meth:`attach` once model and optimizer exist, then :meth:`stop`. A step ends when the
    phase STEP is left for anything but SWITCH, which is part of it, or BACKWARD, which an update inside it interrupted.
    Its block is the one that was active before it.

    Args:
        device: where the model trains.
        every_step: measure memory in every step. Otherwise, where that takes time, only in those that can show a
            higher peak, see badam.profiling.selection; the loop must then call :meth:`next_step`.
        profile: ``full`` also follows the steps that can show a higher peak module by module, and on CUDA keeps the
            allocator's history of the highest; that is slow, and :meth:`save_profile` writes it.
        memory, clock: what measures; by default what fits the device.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        every_step: bool,
        profile: Profile = "normal",
        memory: MemorySource | None = None,
        clock: PhaseClock | None = None,
    ) -> None:
        self.device = device
        self._memory = memory or _memory_source(device)
        self._every_step = every_step or not self._memory.costly
        self._measuring = True
        self._selection = StepSelection()
        self._clock = clock or (CudaClock() if device.type == "cuda" else WallClock())
        self._full = FullProfile(device, self._memory) if profile == "full" else None
        self._following = True  # the coming step, in full mode; a loop that tells of no steps has all followed
        self._steps_ended = 0
        self._states: ModelStates | None = None
        self._stack = ExitStack()
        self._awaiting_seconds: list[tuple[int, StepMemory | None]] = []
        self._block = 0
        self._listeners: list[Callable[[int, StepMemory | None], None]] = []
        self.log = RunLog()

    def start(self) -> None:
        """Begin to measure memory; before the model is built, so that nothing escapes."""
        self._memory.start()
        self._stack.callback(self._memory.stop)
        if self._full is not None:
            self._full.start()
            self._stack.callback(self._full.stop)

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Begin to record steps of ``model`` under ``optimizer``."""
        self._states = ModelStates(model, optimizer)
        self._memory.attach(self._states)
        self._block = self._states.active_block()
        if self._full is not None:
            self._full.attach(model)
        self._clock.resume()
        self._stack.enter_context(phases.listening(self._phase_changes))

    def stop(self) -> None:
        """End recording; may be called again."""
        self._stack.close()
        self._collect(wait=True)

    @property
    def live_bytes(self) -> int:
        """Allocated bytes when the last step ended."""
        return self._memory.live_bytes

    def on_step(self, listener: Callable[[int, StepMemory | None], None]) -> None:
        """Call ``listener`` with the block of every optimizer step that ends, and its memory if that was measured."""
        self._listeners.append(listener)

    def next_step(self, batches: Iterable[Mapping[str, Tensor]], *, full_length: bool = False) -> None:
        """Announce the micro-batches of the coming optimizer step, before its forward.

        Args:
            batches: the tensors that go into the model.
            full_length: they are as large as batches get, and those of the visit's second step will be too.
        """
        assert self._states is not None, "steps begin after attach()"
        tensors = [tensor for batch in batches for tensor in batch.values()]
        picked = self._selection.pick(
            self._states.coming_step(),
            batch_size=max((tensor.numel() for tensor in tensors), default=0),
            full_length=full_length,
        )
        self._measuring = self._every_step or picked
        self._following = picked
        if self._measuring:
            self._clock.phase_begins(phases.current())
            self._memory.begin_step(tensors)
            self._clock.resume()  # getting ready to measure is no part of training

    def note(self, *, loss: float | None = None, tokens: int = 0) -> None:
        """Record the loss of a step, and how many tokens went through the model since the last call."""
        self.log.note(loss, tokens)

    def leave_out(self, seconds: float) -> None:
        """Leave out the last seconds, which were not training but an evaluation or a checkpoint between two steps."""
        self._clock.resume()
        self.log.leave_out(seconds)

    def measured_run(self, plan: Plan, *, command: str | None = None) -> MeasuredRun:
        """What was measured, as a record.

        Args:
            plan: the plan that ran; names the blocks.
            command: what started the run; by default this process's command line.

        Raises:
            BadamError: if no optimizer step was recorded, or no loss was noted.
        """
        self._collect(wait=True)
        names = [block.name for block in plan.partition.blocks]
        return MeasuredRun(
            plan_digest=record_digest(plan),
            model=plan.model,
            method=plan.method,
            training=plan.training,
            measurement=summarize(self.log, names, self._memory.description),
            machine=this_machine(self.device),
            provenance=provenance(" ".join(sys.argv) if command is None else command),
        )

    def save_profile(self, directory: Path, block_names: Sequence[str] = (), plan_digest: str = "") -> list[Path]:
        """Write what full mode recorded beside the measured run; the files written, none in normal mode.

        Raises:
            PlanError: if a file cannot be written.
        """
        return [] if self._full is None else self._full.save(directory, block_names, plan_digest)

    def _phase_changes(self, previous: Phase, phase: Phase) -> None:
        self._clock.phase_begins(phase)
        if self._measuring:
            self._memory.phase_begins(phase)
        ends = previous is Phase.STEP and phase not in (Phase.SWITCH, Phase.BACKWARD)
        if self._full is not None and not ends:
            self._full.phase_begins(previous, phase, follow=self._following)
        if ends:
            self._end_step()
            self._clock.resume()  # reading the allocator's reports is no part of training

    def _end_step(self) -> None:
        assert self._states is not None, "phases are followed after attach() only"
        memory = self._step_memory() if self._measuring else None
        self._measuring = self._every_step
        self._steps_ended += 1
        self._clock.end_step()
        block, self._block = self._block, self._states.active_block()
        self._awaiting_seconds.append((block, memory))
        self._collect()
        for listener in self._listeners:
            listener(block, memory)

    def _step_memory(self) -> StepMemory:
        if self._full is None:
            return self._memory.end_step(pause=not self._every_step)
        self._full.end_step()
        memory = self._memory.end_step(pause=not self._every_step)
        self._full.take(self._steps_ended, self._block, memory)
        return replace(memory, boundaries=())  # their place is the step that was kept

    def _collect(self, *, wait: bool = False) -> None:
        """Join memory with the seconds that have become known."""
        for seconds in self._clock.finished(wait=wait):
            block, memory = self._awaiting_seconds.pop(0)
            self.log.add(StepRecord(block, memory, seconds))


class Recording:
    """What :func:`record` yields."""

    def __init__(self, recorder: Recorder, plan: Plan | None) -> None:
        self._recorder = recorder
        self._plan = plan

    def note(self, *, loss: float, tokens: int = 0) -> None:
        """Record the loss of a step, and how many tokens went through the model since the last call."""
        self._recorder.note(loss=loss, tokens=tokens)

    @property
    def steps(self) -> Sequence[StepRecord]:
        """The optimizer steps so far, each with its block, memory and seconds."""
        return self._recorder.log.steps

    @property
    def live_bytes(self) -> int:
        """Allocated bytes when the last step ended, or when recording began."""
        return self._recorder.live_bytes

    def measured_run(self) -> MeasuredRun:
        """The record that badam-report compares with the plan.

        Raises:
            BadamError: if recording began without a plan, no step was recorded or no loss was noted.
        """
        if self._plan is None:
            raise BadamError(
                "The recording was made without a plan, so there is no record to write.",
                advice="Give one: record(optimizer, model, plan=load_plan('plan.json')).",
            )
        return self._recorder.measured_run(self._plan)

    def save(self, path: str | Path) -> None:
        """Write the record as JSON, and beside it what full mode recorded."""
        save_record(self.measured_run(), path)
        self.save_profile(Path(path).parent)

    def save_profile(self, directory: str | Path) -> list[Path]:
        """Write what full mode recorded into ``directory``; the files written, none in normal mode."""
        if self._plan is None:
            return self._recorder.save_profile(Path(directory))
        names = [block.name for block in self._plan.partition.blocks]
        return self._recorder.save_profile(Path(directory), names, record_digest(self._plan))


@contextmanager
def record(
    optimizer: torch.optim.Optimizer, model: nn.Module, *, plan: Plan | None = None, profile: Profile = "normal"
) -> Iterator[Recording]:
    """Measure a training loop of your own within the ``with`` block.

    The loop need not announce phases: FORWARD begins with the model's call, BACKWARD when the call returns (a loss
    computed outside the model counts as BACKWARD), STEP when the optimizer says so or its step begins, SETUP when the
    step is over. Code that does announce them, such as badam.training.step, is followed instead.

    Args:
        optimizer: the optimizer, of this package or any other.
        model: the model; the device is that of its parameters.
        plan: the plan that the loop runs, to write a measured run; without it ``run.steps`` is all there is.
        profile: ``full`` also follows every step module by module, and on CUDA keeps the allocator's history of the
            highest, which is slow; ``run.save_profile`` writes both, and so does ``run.save``.
    """
    recorder = Recorder(next(model.parameters()).device, every_step=True, profile=profile)
    with ExitStack() as stack:
        recorder.start()
        stack.callback(recorder.stop)
        recorder.attach(model, optimizer)
        for handle in _announcing(model, optimizer):
            stack.callback(handle.remove)
        yield Recording(recorder, plan)


def _announcing(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that announce phases where the loop itself does not."""

    def forward_begins(*_: object) -> None:
        if torch.is_grad_enabled() and phases.current() not in (Phase.FORWARD, Phase.RECOMPUTE):
            phases.enter(Phase.FORWARD)

    def forward_ends(*_: object) -> None:
        if torch.is_grad_enabled() and phases.current() in (Phase.FORWARD, Phase.LOSS):
            phases.enter(Phase.BACKWARD)

    return [
        model.register_forward_pre_hook(forward_begins),
        model.register_forward_hook(forward_ends),
        optimizer.register_step_pre_hook(lambda *_: phases.enter(Phase.STEP)),
        optimizer.register_step_post_hook(lambda *_: phases.enter(Phase.SETUP)),
    ]


def _memory_source(device: torch.device) -> MemorySource:
    if device.type == "cuda":
        from badam.profiling.memory.cuda import CudaMemory

        return CudaMemory()
    from badam.profiling.memory.cpu import CpuMemory

    return CpuMemory()

"""One of several processes that run a plan together, started by torchrun, accelerate or deepspeed.

They share the run's directory. The first speaks for all and writes what is kept; checkpoints they write together. A
signal that one of them gets all of them learn at the end of the step. One that fails ends, and the others lose it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console

from badam.errors import BadamError, InputError, RanksDisagree, in_one_line
from badam.plan import Plan
from badam.training.engines import kind_of
from badam.training.options import RunOptions
from badam.training.run_directory import written_whole

LAUNCHERS_SETTINGS = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION")
"""How ``accelerate launch`` asks for what the plan decides."""

_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process",
    "Timed out waiting",
    "NCCL",
    "Socket",
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Processes:
    """Which of how many processes this is, and what they tell each other. All methods are collective."""

    rank: int = 0
    count: int = 1
    group: Any = None  # on the host, apart from training's own messages

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all and writes what is kept."""
        return self.rank == 0

    def first(self, act: Callable[[], T]) -> T:
        """What ``act`` returned in the first process, where alone it ran; if it failed there, all of them end."""
        if self.count == 1:
            return act()
        told: list[Any] = [None, None]
        try:
            if self.is_first:
                told[0] = act()
        except BaseException as error:
            number = getattr(error, "signal", None)  # of badam.training.interruption.Stopped
            told[1] = error.exit_code if isinstance(error, BadamError) else 128 + number if number else 1
            raise
        finally:
            dist.broadcast_object_list(told, src=0, group=self.group)
        if told[1] is not None:
            raise SystemExit(told[1])
        return told[0]  # type: ignore[no-any-return]

    def gathered(self, value: T) -> list[T]:
        """The value of every process, by rank."""
        if self.count == 1:
            return [value]
        every: list[Any] = [None] * self.count
        dist.all_gather_object(every, value, group=self.group)
        return every

    def sums(self, *numbers: float) -> list[float]:
        """Each number added up over the processes."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def most(self, *numbers: float) -> list[float]:
        """Each number's largest over the processes."""
        return self._reduced(numbers, dist.ReduceOp.MAX)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier(self.group)

    def _reduced(self, numbers: tuple[float, ...], how: Any) -> list[float]:
        values = torch.tensor(numbers, dtype=torch.float64)
        if self.count > 1:
            dist.all_reduce(values, op=how, group=self.group)
        return values.tolist()

    @contextmanager
    def writing(self, target: Path) -> Iterator[Path]:
        """A directory for all processes to write into, which becomes ``target`` if none of them fails.

        One that fails cannot tell the others, which may be waiting for it anywhere in what they write together. It has
        to end: then their waiting fails, here at the latest.
        """
        with ExitStack() as stack:
            partial = target.with_name(f".{target.name}.partial")
            if self.is_first:
                stack.enter_context(written_whole(target))
            self.wait()
            yield partial
            self.wait()
        self.wait()

    def file(self, path: Path) -> Path:
        """``path`` for the first process; for the others, where what they write is lost."""
        return path if self.is_first else Path(os.devnull)


def started_processes() -> int:
    """How many processes the launcher says that it has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_processes(plan: Plan, options: RunOptions, device: torch.device) -> Processes:
    """Get to know the other processes, if the plan is for several cards. Collective.

    Raises:
        InputError: if the plan's engine and the way in which this process was started do not go together, or an option
            is not known among several processes.
    """
    engine, count = plan.target.engine, started_processes()
    if not kind_of(plan).is_for_several:
        if count > 1:
            raise InputError(
                f"The plan is for one card, and {count} processes were started.",
                advice="Start one, or plan with --engine fsdp2, zero3 or ddp.",
            )
        return Processes()
    if count == 1:
        raise InputError(
            f"The plan is for {plan.target.num_gpus} cards under {engine}, and one process was started.",
            advice=f"Start them with: torchrun --nproc-per-node {plan.target.num_gpus} -m badam_cli.train --plan ...",
        )
    _check_known(plan, options)
    for name in LAUNCHERS_SETTINGS:  # accelerate shall wrap nothing: the plan says how the model is placed
        os.environ.pop(name, None)
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))


def _check_known(plan: Plan, options: RunOptions) -> None:
    if options.adapt:
        raise InputError(
            "badam-train does not know --adapt among several processes: where one alone began its step anew, the "
            "others would wait for it.",
            advice="Leave it out, and plan with a smaller --batch-size.",
        )
    if plan.method != "badam":
        raise InputError(
            f"Several processes train with badam, not with {plan.method}.", advice="Plan with --engine single."
        )
    if plan.training.dtype == "float16":
        raise InputError(
            "Several processes train in bfloat16 or float32: each would scale its float16 losses differently.",
            advice="Plan with --dtype bfloat16.",
        )


def shared_plan(plan: Plan, processes: Processes) -> Plan:
    """``plan`` for the processes that there are: with its global batch, whatever their number.

    Raises:
        InputError: if they cannot have equal parts of it.
    """
    planned, there = plan.target.num_gpus, processes.count
    if planned == there:
        return plan
    accumulate, rest = divmod(planned * plan.training.grad_accum, there)
    if rest:
        raise InputError(
            f"{there} processes cannot divide the {planned * plan.training.grad_accum} micro-batches of a step, which "
            f"the plan has for {planned} cards.",
            advice=f"Start {planned}, or plan with --num-gpus {there}.",
        )
    target = plan.target.model_copy(update={"num_gpus": there, "shard_size": _shard_size(plan, there)})
    training = plan.training.model_copy(update={"grad_accum": accumulate})
    return plan.model_copy(update={"target": target, "training": training})


def _shard_size(plan: Plan, there: int) -> int | None:
    """The smallest group of processes for one copy of the model in which none needs more memory than in the plan's."""
    planned = plan.target.shard_size
    if planned is None:
        return None
    return next(size for size in range(1, there + 1) if there % size == 0 and (size >= planned or size == there))


def shared_options(options: RunOptions, console: Console, processes: Processes) -> tuple[RunOptions, Console]:
    """The first process's directory for all; the others say nothing and report to nobody."""
    if processes.count == 1:
        return options, console
    directory = processes.first(lambda: options.output_dir)
    if processes.is_first:
        return options, console
    return replace(options, output_dir=directory, report_to=(), profile="normal"), Console(quiet=True)


@contextmanager
def explain_lost_processes(processes: Processes) -> Iterator[None]:
    """Turn what a library says when another process is gone into a sentence.

    Raises:
        RanksDisagree: then.
    """
    try:
        yield
    except RuntimeError as error:
        if processes.count == 1 or not any(sign in str(error) for sign in _LOST):
            raise
        raise RanksDisagree(
            f"Process {processes.rank} of {processes.count} lost another one ({in_one_line(error, 120)}).",
            advice="See what the first one to end says. The last checkpoint is whole: go on with --resume.",
        ) from error

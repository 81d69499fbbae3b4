"""One of several processes that run a plan together, started by torchrun or accelerate.

accelerate wraps nothing here: FSDP2's units are those that the planner has reckoned with, and DDP's reducer would know
the first block only. So each process shards the model, or leaves it whole, before the trainer sees it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch.optim import Optimizer

from badam.block_optimizer import BlockOptimizer
from badam.errors import InputError
from badam.plan import Plan
from badam.training.options import RunOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARED_ENGINES = ("ddp", "fsdp2")


@dataclass(frozen=True, slots=True)
class Processes:
    """Which of how many processes this is."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all and writes what is kept."""
        return self.rank == 0


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
    if engine == "zero3":
        raise InputError(
            "badam-train does not start DeepSpeed.",
            advice="Plan with --engine fsdp2, or give BlockOptimizer to deepspeed.initialize in a loop of your own.",
        )
    if engine == "single":
        if count > 1:
            raise InputError(
                f"The plan is for one card, and {count} processes were started.",
                advice="Start one, or plan with --engine fsdp2 or --engine ddp.",
            )
        return Processes()
    if count == 1:
        raise InputError(
            f"The plan is for {plan.target.num_gpus} cards under {engine}, and one process was started.",
            advice=f"Start them with: torchrun --nproc-per-node {plan.target.num_gpus} -m badam_cli.train --plan ...",
        )
    wishes = {
        "--resume": options.resume,
        "--save-steps": options.save_steps,
        "--eval-data and --eval-share": options.evaluates,
        "--adapt": options.adapt,
    }
    for option, value in wishes.items():
        if value:
            raise InputError(
                f"badam-train does not know {option} among several processes.",
                advice="Leave it out, or use badam.distributed in a loop of your own.",
            )
    if plan.method != "badam" or plan.model.task != "causal-lm":
        raise InputError(
            f"Several processes train language models with badam, not {plan.method} for {plan.model.task}.",
            advice="Plan with --engine single.",
        )
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(dist.get_rank(), dist.get_world_size())


def apart(processes: Processes, options: RunOptions, console: Console, stack: ExitStack) -> tuple[RunOptions, Console]:
    """Let all processes but the first write into a directory of their own, which ``stack`` removes, and say nothing."""
    if processes.is_first:
        return options, console
    directory = tempfile.mkdtemp(prefix="badam-rank-")
    stack.callback(shutil.rmtree, directory, ignore_errors=True)
    return replace(options, output_dir=Path(directory), report_to=()), Console(quiet=True)


def place(model: PreTrainedModel, plan: Plan, processes: Processes) -> None:
    """Shard ``model`` if the plan says so."""
    if processes.count == 1 or plan.target.engine != "fsdp2":
        return
    from torch.distributed.fsdp import register_fsdp_forward_method

    from badam.distributed import shard_blocks

    shard_blocks(model)
    type(model).loss_within = _loss_within  # of the class that FSDP2 has made for this model
    register_fsdp_forward_method(model, "loss_within")


def follow(model: PreTrainedModel, optimizer: Optimizer, plan: Plan) -> None:
    """Let the gathers of a sharded model follow the optimizer's blocks."""
    if plan.target.engine == "fsdp2" and dist.is_initialized():
        from badam.distributed.fsdp2 import follow_blocks

        assert isinstance(optimizer, BlockOptimizer)
        follow_blocks(model, optimizer)


def whole_weights(model: PreTrainedModel) -> dict[str, Any]:
    """All weights in the first process's host memory; nothing in the others. Collective."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _loss_within(model: Any, compute: Any) -> Any:
    """``compute()``, for which FSDP2 gathers the root's parameters: the chunked loss reaches for the head itself."""
    return compute()

"""What is asked of the planner: typed, validated and frozen, from the command or from Python. Loads no torch.

A question names model and device as people do. What it depends on beside itself, the model's configuration and the
device's figures, is looked up in ``badam_planner.search.answers``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, PositiveFloat, ValidationError
from pydantic.dataclasses import dataclass

from badam.errors import InputError
from badam.plan import Count, MethodOptions, Seed, mistakes_in
from badam.vocabulary import (
    AttentionChoice,
    CheckpointingChoice,
    Dtype,
    Engine,
    LossChoice,
    Method,
    Offload,
    PartitionChoice,
    SegmentsChoice,
    SwitchMode,
    TaskChoice,
)
from badam_planner.multi_gpu.engines import ENGINES

MOST_SHARDS_NAMED = 4096

_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Choices:
    """How to train, whatever the model and the device; ``auto`` and None leave it to the planner."""

    method: Method = "badam"
    compare_methods: bool = False  # also plan every other method
    partition: PartitionChoice = "auto"
    include_embedding: bool = False
    include_lm_head: bool = False
    active_modules: tuple[str, ...] = ()  # trained in every visit, besides its block
    batch_size: Count = 1  # sequences per micro-batch and GPU
    grad_accum: Count = 1  # micro-batches per optimizer step
    dtype: Dtype = "bfloat16"
    checkpointing: CheckpointingChoice = "auto"
    loss: LossChoice = "auto"
    expandable_segments: SegmentsChoice = "auto"
    allow_cache_release: bool = False  # also plan what runs only because torch gives back cached segments
    switch_every: int | None = None  # K, the optimizer steps of each visit; None: by the number of samples
    switch_mode: SwitchMode = "random"
    samples: Count | None = None  # of an epoch
    learning_rate: PositiveFloat = 1e-5
    options: MethodOptions = Field(default_factory=MethodOptions)  # of single methods
    seed: Seed = 0
    exact: bool = False  # rehearse every layer instead of one of each kind


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Question(Choices):
    """What is asked: which model, on which device, and how to train it."""

    model: str  # catalogue name, Hub id, directory or config.json
    task: TaskChoice = "auto"
    num_labels: Annotated[int, Field(ge=2)] | None = None
    gpu: str = "auto"  # by name, auto for the one in this machine, or cpu
    gpu_memory_bytes: Count | None = None  # that may be used, instead of what the GPU has
    num_gpus: Count | Literal["auto"] = 1
    engine: Engine = "single"
    shard_size: Count | Literal["auto"] | None = None  # under fsdp2, GPUs that one copy is sharded over
    offload: Offload = "none"
    gpus_per_node: Count = 8
    seq_len: Count | None = None  # None: 512, or what the model fixes
    decoder_len: Count | None = None
    attention: AttentionChoice = "auto"


@contextmanager
def wrong_values_refused() -> Iterator[None]:
    """Turn what is wrong with the values of a question into one sentence that names the option.

    Raises:
        InputError: in place of pydantic's ValidationError.
    """
    try:
        yield
    except ValidationError as error:
        field, mistake = mistakes_in(error)
        name = field.split(".")[-1 if field.startswith("options.") else 0]
        raise InputError(
            f"--{name.replace('_', '-')}: {mistake}.", advice="badam-plan --help lists the options."
        ) from error


def check_gpus(question: Question) -> None:
    """Refuse numbers of GPUs, engines and what is offloaded that do not go together.

    Raises:
        InputError: with what to change.
    """
    engine, number, model = question.engine, question.num_gpus, ENGINES[question.engine]
    if not model.joins_gpus and number != 1:
        raise InputError(
            f"--num-gpus {number} needs an engine for several cards.", advice="Add --engine fsdp2, or --engine ddp."
        )
    if model.joins_gpus and number == 1:
        raise InputError(
            f"--engine {engine} joins cards, and there is one.",
            advice=f"Say how many with --num-gpus, or leave --engine {engine} out.",
        )
    if model.joins_gpus and not model.cuts_model and number == "auto":
        raise InputError(
            f"With --engine {engine} every card needs the same memory, so there is no fewest that fit.",
            advice="Give a number.",
        )
    if question.offload != "none" and not model.offloads:
        raise InputError(f"--offload {question.offload} needs DeepSpeed, not {engine}.", advice="Add --engine zero3.")
    _check_shard_size(question)


def _check_shard_size(question: Question) -> None:
    size, number = question.shard_size, question.num_gpus
    if size is None:
        return
    if not ENGINES[question.engine].cuts_into_groups:
        raise InputError(f"--shard-size {size} needs FSDP2, not {question.engine}.", advice="Add --engine fsdp2.")
    if size == 1:
        raise InputError("With --shard-size 1 no copy of the model would be cut.", advice="Use --engine ddp.")
    if number == "auto":
        raise InputError(
            f"With --shard-size {size} what a card needs does not depend on the number of cards.",
            advice="Give --num-gpus a number; or leave --shard-size out, to find the fewest cards for one copy.",
        )
    if size != "auto" and number % size:
        whole = [shards for shards in range(2, min(number, MOST_SHARDS_NAMED) + 1) if number % shards == 0]
        raise InputError(
            f"{number} cards cannot be divided into groups of {size}.",
            advice=f"Choose --shard-size among {', '.join(map(str, whole))}.",
        )

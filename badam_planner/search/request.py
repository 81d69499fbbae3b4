"""What the user asks of the planner, and the plan of one candidate, not yet predicted."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import inf

from badam.blocks.partition import partition_parameters
from badam.errors import InputError
from badam.plan import (
    BlockPlan,
    MethodOptions,
    ModelSpec,
    OptimizerSpec,
    Partition,
    Plan,
    Provenance,
    Schedule,
    Target,
    Training,
)
from badam.training.methods import method_of
from badam.training.tasks import TRAINED_HERE
from badam.units import format_batch
from badam.vocabulary import Attention, Dtype, Method, Strategy, SwitchMode
from badam_planner.rehearsal.model_tree import ModelTree
from badam_planner.search.settings import MemorySetting, strategies


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for; "auto" leaves the choice to the search."""

    spec: ModelSpec
    target: Target
    method: Method = "badam"
    compare_methods: bool = False
    partition: str = "auto"
    include_embedding: bool = False
    include_lm_head: bool = False
    active_modules: tuple[str, ...] = ()
    batch_size: int = 1
    seq_len: int = 512
    decoder_len: int | None = None
    grad_accum: int = 1
    dtype: Dtype = "bfloat16"
    checkpointing: str = "auto"
    loss: str = "auto"
    expandable_segments: str = "auto"
    attention: Attention = "sdpa"
    switch_every: int | None = None
    switch_mode: SwitchMode = "random"
    samples: int | None = None
    epochs: float = 1.0
    learning_rate: float = 1e-5
    options: MethodOptions = field(default_factory=MethodOptions)
    seed: int = 0
    exact: bool = False
    find_num_gpus: bool = False
    find_shard_size: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < inf:
            raise InputError(
                f"The learning rate {self.learning_rate} is not a positive number.",
                advice="Give one: --learning-rate 1e-5.",
            )
        if self.target.engine != "single" and (self.method != "badam" or self.compare_methods):
            raise InputError(
                f"Only --method badam can be planned for several cards, not {self.method}"
                + (" beside other methods." if self.compare_methods else "."),
                advice="Plan other methods with --engine single.",
            )
        if self.target.engine != "single" and self.spec.task not in TRAINED_HERE:
            raise InputError(
                f"Training for {self.spec.task} can be planned for one card only, not for several.",
                advice="Plan it with --engine single.",
            )


def batch_in_words(request: Request) -> str:
    """The micro-batch as messages name it."""
    return format_batch(request.spec.task, request.batch_size, request.seq_len, request.decoder_len)


def staged_plan(request: Request, strategy: Strategy, setting: MemorySetting, tree: ModelTree) -> Plan:
    """The plan of one candidate, without its prediction."""
    blocks = _blocks(request, strategy, tree)
    layers = tree.layers if setting.checkpointing == "all" else ()
    blocks = [block.model_copy(update={"checkpointed_layers": layers}) for block in blocks]
    return Plan(
        model=request.spec,
        target=request.target.model_copy(update={"expandable_segments": setting.expandable_segments}),
        method=request.method,
        partition=Partition(strategy=strategy, blocks=tuple(blocks), active_modules=_always_active(request)),
        schedule=Schedule(
            switch_mode=request.switch_mode if request.method != "hift" else "ascending",
            switch_every=visit_length(request, len(blocks)),
            seed=request.seed,
        ),
        training=Training(
            batch_size=request.batch_size,
            seq_len=request.seq_len,
            decoder_len=request.decoder_len,
            grad_accum=request.grad_accum,
            dtype=request.dtype,
            checkpointing=setting.checkpointing,
            loss=setting.loss,
            attention=request.attention,
            optimizer=OptimizerSpec(
                learning_rate=request.learning_rate, max_grad_norm=1.0 if method_of(request.method).clips else 0.0
            ),
            options=request.options,
        ),
        provenance=Provenance(
            versions=tree.versions, command=request.command, date=datetime.now(UTC).isoformat(timespec="seconds")
        ),
    )


def _always_active(request: Request) -> tuple[str, ...]:
    """What the user wants trained in every visit.

    Raises:
        InputError: for a method without visits.
    """
    if request.active_modules and "layer" not in strategies(request.method, "auto"):
        raise InputError(
            f"{request.method} has no blocks, so no module can be active besides them.",
            advice="Leave --active-module out, or plan with --method badam.",
        )
    return request.active_modules


def _blocks(request: Request, strategy: Strategy, tree: ModelTree) -> list[BlockPlan]:
    """The blocks of a strategy; methods without blocks have one, "all"."""
    if strategy == "full":
        prefixes = tuple(dict.fromkeys(info.name.split(".", 1)[0] for info in tree.parameters))
        return [BlockPlan(name="all", prefixes=prefixes, parameters=request.spec.parameters)]
    cut = partition_parameters(
        tree.parameters,
        "layer" if strategy == "ratio" else strategy,
        include_embedding=request.include_embedding,
        include_lm_head=request.include_lm_head,
    )
    if strategy == "ratio":
        prefixes = tuple(prefix for block in cut for prefix in block.prefixes)
        return [BlockPlan(name="all", prefixes=prefixes, parameters=sum(block.parameters for block in cut))]
    return [BlockPlan(name=block.name, prefixes=block.prefixes, parameters=block.parameters) for block in cut]


def visit_length(request: Request, blocks: int) -> int:
    """Steps per visit K: what the user asked for, else min(max(n / (B D), 50), 100) for n samples per epoch.

    HiFT goes on to the next block in every step.

    Source: arXiv 2404.02827, appendix on hyperparameters. Without a number of samples the lower bound is taken.
    """
    if request.switch_every is not None:
        return request.switch_every
    if request.method == "hift":
        return 1
    per_step = request.batch_size * request.grad_accum * blocks
    return min(max((request.samples or 0) // per_step, 50), 100)

"""What the user asks of the planner, and the plan of one candidate, not yet predicted."""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

from pydantic.dataclasses import dataclass

from badam.blocks.partition import partition_parameters
from badam.errors import InputError
from badam.plan import (
    BlockPlan,
    Count,
    ModelSpec,
    OptimizerSpec,
    Partition,
    Plan,
    Provenance,
    Schedule,
    Target,
    Training,
)
from badam.training.build import choose_attention, model_config
from badam.training.methods import method_of
from badam.training.tasks import TRAINED_HERE, chosen_lengths
from badam.units import format_batch
from badam.vocabulary import Attention, ModelSource, Strategy
from badam_planner.multi_gpu.engines import engine_of
from badam_planner.rehearsal.model_tree import ModelTree
from badam_planner.search.model_spec import specify
from badam_planner.search.question import Choices, Question
from badam_planner.search.settings import MemorySetting, strategies


@dataclass(frozen=True, kw_only=True)
class Request(Choices):
    """A question whose model and device are known: what the search works on."""

    spec: ModelSpec
    target: Target
    seq_len: Count = 512
    decoder_len: Count | None = None
    attention: Attention = "sdpa"
    find_num_gpus: bool = False  # the target's number is to be found
    find_shard_size: bool = False
    command: str = ""  # as the plan records it


def request_for(
    question: Question, source: tuple[str, ModelSource, dict[str, Any]], target: Target, command: str
) -> Request:
    """What a question asks of the search, now that its model and its device were found.

    Args:
        question: what was asked.
        source: its model, as :func:`badam_planner.sources.model_source.find_config` returns it.
        target: its device.
        command: for the plan's record.

    Raises:
        InputError: if transformers cannot build the model, or it is not made for the task or the length.
    """
    task = None if question.task == "auto" else question.task
    spec = specify(*source, task=task, labels=question.num_labels)
    seq_len, decoder_len = chosen_lengths(spec, model_config(spec), question.seq_len, question.decoder_len)
    choices = {field.name: getattr(question, field.name) for field in fields(Choices)}
    return Request(
        **choices,
        spec=spec,
        target=target,
        seq_len=seq_len,
        decoder_len=decoder_len,
        attention=choose_attention(spec) if question.attention == "auto" else question.attention,
        find_num_gpus=question.num_gpus == "auto",
        find_shard_size=question.shard_size == "auto",
        command=command,
    )


def check_engine(request: Request) -> None:
    """Refuse what cannot be planned for several GPUs.

    Raises:
        InputError: for another method than badam, and for a task that is not trained here.
    """
    if not engine_of(request.target).joins_gpus:
        return
    if request.method != "badam" or request.compare_methods:
        raise InputError(
            f"Only --method badam can be planned for several cards, not {request.method}"
            + (" beside other methods." if request.compare_methods else "."),
            advice="Plan other methods with --engine single.",
        )
    if request.spec.task not in TRAINED_HERE:
        raise InputError(
            f"Training for {request.spec.task} can be planned for one card only, not for several.",
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

"""Rehearse one of several ranks under FSDP2: the trainer's own code, FSDP2 included, on fake tensors.

A visit's first two steps are rehearsed: FSDP2 prepares itself in the first forward, and masters and moments come into
being in the first update. The second step holds what every later one holds.

Plans are not predicted from this yet: :mod:`badam_planner.multi_gpu.fsdp2`, which derives a rank's step from that of
one GPU, answers until families of sizes, gloo's copies and traffic follow from this one too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import nn

from badam import phases
from badam.distributed.fsdp2 import follow_blocks, mesh_of, shard_units, thaw_for_first_forward
from badam.optim.block import BlockOptimizer
from badam.plan import Plan
from badam.training.build import build_optimizer, prepare_checkpointing, prepare_model
from badam.training.engines import engine_of
from badam.training.methods import method_of
from badam.training.step import Batch, train_step
from badam.training.tasks import blank_batch
from badam.vocabulary import Phase
from badam_planner.recording.recording import Recording, TensorRole
from badam_planner.rehearsal.fake_ranks import RankTracker, fake_ranks
from badam_planner.rehearsal.kept_layers import build_without
from badam_planner.rehearsal.rehearse import (
    VISIT_STEPS,
    _attention_of,
    _label_weights,
    _masks_of,
    _of_one_visit,
    _without_garbage_collection,
    fake_model,
    fake_world,
    label_states,
)
from badam_planner.rehearsal.values import refusing_what_needs_values


def rehearse_rank(
    plan: Plan,
    block: int,
    *,
    layers: Sequence[str] = (),
    classes: Sequence[type[nn.Module]] = (),
    without: Mapping[str, str] | None = None,
) -> Recording:
    """Rehearse one of the plan's GPUs under FSDP2 with block number ``block`` active.

    Args:
        plan, block, layers, classes, without: as for :func:`badam_planner.rehearsal.rehearse.rehearse`.

    Raises:
        InputError: if the model's code asks for values of tensors, which are not there.
    """
    without = without or {}
    method = method_of(plan.method)
    staged, start = method.rehearsed_plan(*_of_one_visit(plan, block, without))
    phases.enter(Phase.SETUP)
    with ExitStack() as stack:
        stack.enter_context(fake_ranks(plan.target.num_gpus))
        mesh = mesh_of(plan.target.shards)
        stack.enter_context(refusing_what_needs_values(plan.model))
        mode = stack.enter_context(fake_world())
        stack.enter_context(_attention_of(plan.target))
        stack.enter_context(_masks_of(plan.model))
        stack.enter_context(_without_garbage_collection())
        model = build_without(lambda: fake_model(plan.model, plan.training), layers, classes, without)
        trained = shard_units(model, mesh=mesh, layers=[layer for layer in layers if layer not in without])
        thaw_for_first_forward(model, trained)
        engine = engine_of(plan)
        engine.place(model)
        prepare_model(model, plan)
        tracker = RankTracker(model, layers, mode=mode, target=plan.target)
        _label_weights(model, method, tracker, layers, without)

        def next_batch() -> tuple[Batch, torch.Tensor]:
            batch = blank_batch(plan, model.config)
            tracker.tell(batch.items(), TensorRole.BATCH)
            return batch, torch.zeros((), dtype=torch.int64)

        with tracker.watching():
            optimizer = build_optimizer(model, staged, start_block=start)
            assert isinstance(optimizer, BlockOptimizer), "planning refuses other methods on several GPUs"
            follow_blocks(model, optimizer)
            prepare_checkpointing(model, optimizer, staged)
            for _ in range(VISIT_STEPS):
                train_step(
                    plan,
                    method,
                    model,
                    optimizer,
                    next_batch,
                    micro_batches=plan.training.grad_accum,
                    engine=engine,
                )
                label_states(model, optimizer, tracker)
        return tracker.recording

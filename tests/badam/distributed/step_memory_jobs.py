"""What the processes of the tests of the planner run: the memory and the traffic of a training step."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from badam import BlockOptimizer
from badam.distributed import shard_blocks, sharded_block_optimizer
from badam.distributed.deepspeed.engine import as_forward, backward, start_zero3
from badam.distributed.fsdp2 import mesh_of
from badam.plan import Plan
from badam.profiling.memory.cpu_allocator_log import AllocatorLog
from badam.profiling.memory.states import ModelStates, distinct_bytes
from badam.training.build import build_model, prepare_checkpointing
from badam.training.losses import forward_loss


def llama_peak(plan_json: str, block: int) -> dict[str, Any]:
    """Highest allocated bytes of one visit to a block, by the allocator's own reports, and the collectives of a step.

    Everything is made while the allocator is listened to, so that the account is a plain sum.
    """

    plan = Plan.model_validate_json(plan_json)
    staged = plan.partition.blocks[block]
    gc.collect()
    log = AllocatorLog()
    log.start()
    torch.manual_seed(0)
    model = build_model(plan.model, plan.training)
    shard_blocks(model, mesh=mesh_of(plan.target.shards))
    optimizer = sharded_block_optimizer(
        model,
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-5, fused=True),
        block_prefix_list=[list(staged.prefixes)],
        switch_mode="fixed",
        switch_block_every=0,
        verbose=0,
    )
    prepare_checkpointing(
        model, optimizer, plan.model_copy(update={"partition": plan.partition.model_copy(update={"blocks": (staged,)})})
    )
    shape = (plan.training.batch_size, plan.training.seq_len)

    def step() -> None:
        for part in range(plan.training.grad_accum):
            model.set_requires_all_reduce(part + 1 == plan.training.grad_accum)
            tokens = torch.zeros(shape, dtype=torch.int64)
            batch = {"input_ids": tokens, "labels": torch.zeros(shape, dtype=torch.int64)}
            forward_loss(model, batch, plan.training.loss, num_items=torch.tensor(8)).backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()

    return measured_step(step, log)


def zero3_peak(plan_json: str, block: int) -> dict[str, Any]:
    """The same as :func:`llama_peak` under DeepSpeed."""

    plan = Plan.model_validate_json(plan_json)
    staged = plan.partition.blocks[block]
    alone = plan.model_copy(update={"partition": plan.partition.model_copy(update={"blocks": (staged,)})})
    gc.collect()
    log = AllocatorLog()
    log.start()
    torch.manual_seed(0)
    model = build_model(plan.model, plan.training)
    optimizer = BlockOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True),
        list(model.named_parameters()),
        block_prefix_list=[list(staged.prefixes)],
        switch_mode="fixed",
        switch_block_every=0,
        verbose=0,
    )
    prepare_checkpointing(model, optimizer, alone)
    accumulate = plan.training.grad_accum
    engine = start_zero3(
        model,
        optimizer,
        batch_size=plan.training.batch_size,
        accumulate=accumulate,
        max_grad_norm=1.0,
        offload_optimizer=plan.target.offload != "none",
        offload_parameters=plan.target.offload == "all",
    )
    shape = (plan.training.batch_size, plan.training.seq_len)

    def whole(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return forward_loss(model, batch, plan.training.loss, num_items=torch.tensor(8))

    def step() -> None:
        for part in range(accumulate):
            tokens = torch.zeros(shape, dtype=torch.int64)
            batch = {"input_ids": tokens, "labels": torch.zeros(shape, dtype=torch.int64)}
            loss = as_forward(model, partial(whole, batch)) if plan.training.loss == "chunked" else whole(batch)
            backward(engine, loss, is_last=part + 1 == accumulate)
        engine.step()

    step()  # DeepSpeed learns the order of the layers in the first step, and gathers ahead from the second on
    return {**measured_step(step, log), "owned": owned_bytes(model, optimizer)}


def owned_bytes(model: torch.nn.Module, optimizer: BlockOptimizer) -> dict[str, int]:
    """By category, the bytes of the tensors that DeepSpeed holds itself, gathered parameters left out."""
    states = ModelStates(model, optimizer)
    parts = [one for one in states.parameters() if hasattr(one.tensor, "ds_numel") and not hasattr(one.tensor, "ds_id")]
    held = distinct_bytes([*parts, *states.optimizer_states(), *states.gradients()])
    return {str(category): nbytes for category, nbytes in held.items()}


def measured_step(step: Callable[[], None], log: AllocatorLog) -> dict[str, Any]:
    """The highest allocated bytes in the second of three calls of ``step``, and the collectives of the third."""
    step()
    gc.collect()
    log.mark(0)
    step()
    events = log.stop()
    live = peak = 0
    counting = False
    there: dict[int, int] = {}  # by address: a block that another thread took back is known by its next use alone
    for address, nbytes in events:
        counting = counting or nbytes == 0
        if nbytes:
            live += max(nbytes, 0) - there.pop(address, 0)
        if nbytes > 0:
            there[address] = nbytes
        peak = max(peak, live) if counting else 0
    with SentBytes() as counter:
        step()
    return {"peak": peak, "counts": counter.counts, "sent": counter.sent, "by_kind": counter.by_kind}


def llama_sent_by_full_training(plan_json: str) -> float:
    """Bytes that this process sends in a step that trains every parameter."""
    plan = Plan.model_validate_json(plan_json)
    model = build_model(plan.model, plan.training)
    shard_blocks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    shape = (plan.training.batch_size, plan.training.seq_len)
    for _ in range(2):
        with SentBytes() as counter:
            batch = {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "labels")}
            forward_loss(model, batch, plan.training.loss, num_items=torch.tensor(8)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return counter.sent


class SentBytes(TorchDispatchMode):
    """Counts collectives and the bytes that each process sends for them by the ring algorithm."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.by_kind: dict[str, float] = {}
        self.sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = str(func._overloadpacket).rpartition(".")[2]
            first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
            second = args[1][0] if isinstance(args[1], (list, tuple)) else args[1]
            whole = {
                "_allgather_base_": lambda: (first, args[2]),
                "_reduce_scatter_base_": lambda: (second, args[2]),
                "allreduce_": lambda: (first, args[1]),
            }.get(name)
            if whole is not None:
                tensor, group = whole()
                size = dist.ProcessGroup.unbox(group).size()
                sent = tensor.nbytes * (size - 1) / size * (2 if name == "allreduce_" else 1)
                self.counts[name] = self.counts.get(name, 0) + 1
                self.by_kind[name] = self.by_kind.get(name, 0.0) + sent
                self.sent += sent
        return func(*args, **(kwargs or {}))

"""What the processes of the tests of FSDP2 and of whole copies run."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from badam import BlockOptimizer, BlockOptimizerRatio
from badam.distributed import average_instead_of_ddp, shard_blocks, sharded_block_optimizer
from badam.distributed.fsdp2 import mesh_of
from badam.errors import InputError, RanksDisagree
from badam.optim import ranks as _ranks
from tests.badam.distributed.small_training import (
    LAYERS,
    OPTIONS,
    SWITCH_EVERY,
    THREE_EPOCHS,
    Run,
    adamw,
    make,
    make_net,
    micro_batch,
    run,
    train,
    weights,
)


def several(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """:func:`run` for each of ``cases``: starting processes takes longer than training."""
    return {name: run(**settings) for name, settings in cases.items()}


def behind_ddp() -> Run:
    model = make_net()
    optimizer = BlockOptimizer(adamw(model.parameters()), list(model.named_parameters()), **OPTIONS)
    wrapped = nn.parallel.DistributedDataParallel(model)
    average_instead_of_ddp(wrapped, optimizer)
    return train(wrapped, optimizer, THREE_EPOCHS), weights(model)


def collectives(visits: int = 2 * LAYERS, **settings: Any) -> list[tuple[str, dict[str, int]]]:
    """For each visit, its block and how often FSDP2 gathered and reduced in one forward and backward."""
    model, optimizer = make(how="fsdp", **settings)
    counted = []
    for _ in range(visits):
        tokens = micro_batch(optimizer.global_step, 0)
        with CommDebugMode() as counter:
            model(tokens).square().mean().backward()
        counts = {str(key).rsplit(".", 1)[-1]: value for key, value in counter.get_comm_counts().items()}
        assert all(parameter.grad is None for parameter in model.parameters())  # the optimizer has taken them
        assert all(each.gradient is not None for each in optimizer.active_parameters)
        counted.append((optimizer.current_block.name, counts))
        optimizer.switch_trainable_params()
    return counted


def states() -> dict[str, Any]:
    """What a process holds of a bf16 model in its second visit: types and entries."""
    model, optimizer = make(how="fsdp", dtype="bfloat16")
    train(model, optimizer, SWITCH_EVERY + 1)
    active = {each.name for each in optimizer.active_parameters}
    local = {name: parameter.to_local() for name, parameter in model.named_parameters()}
    entries = sum(local[name].numel() for name in active)
    state = [
        value.to_local() for entry in optimizer.state.values() for value in entry.values() if isinstance(value, DTensor)
    ]
    return {
        "types": {str(value.dtype) for value in local.values()},
        "entries": entries,
        "masters": [(str(each.dtype), each.to_local().numel()) for each in optimizer.masters.values()],
        "moments": [(str(each.dtype), each.numel()) for each in state],
        "trained": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "active": sorted(active),
    }


def disagree(what: str) -> str:
    """The message that this process gets when rank 1 has another ``what``."""
    odd = dist.get_rank() == 1
    changes: dict[str, Any] = {
        "seed": {"seed": 6},
        "K": {"switch_block_every": 4},
        "partition": {"block_prefix_list": [["layers.0"], ["layers.1"]]},
        "order": {"switch_mode": "ascending"},
    }.get(what, {})
    try:
        model, optimizer = make(how="fsdp", **(changes if odd else {}))
        if what == "learning rate" and odd:
            optimizer.param_groups[0]["lr"] = 1.0
        if what == "learning rate":
            optimizer.load_state_dict(optimizer.state_dict())
        if what == "steps" and odd:
            optimizer.global_step += 1
        model(micro_batch(0, 0)).square().mean().backward()
        optimizer.step()
    except RanksDisagree as error:
        return str(error)
    return "nothing"


def every_disagreement() -> dict[str, str]:
    """:func:`disagree` for all that processes can disagree on."""
    return {what: disagree(what) for what in ("seed", "K", "partition", "order", "learning rate", "steps")}


def one_switches_alone() -> str:
    """Rank 1 leaves its block early; it says so when the others do not come."""
    usual, _ranks.PATIENCE = _ranks.PATIENCE, timedelta(seconds=1)
    _, optimizer = make(how="copies")
    _ranks.PATIENCE = usual
    if dist.get_rank() == 0:
        time.sleep(2)
        return "waited"
    try:
        optimizer.switch_trainable_params()
    except RanksDisagree as error:
        return str(error)
    return "nothing"


def non_finite_on_one_rank(how: str) -> tuple[int, int, bool]:
    """Steps skipped and done, and whether any weight is wrong, when rank 1 alone has an infinite gradient."""
    model, optimizer = make(how=how)
    train(model, optimizer, 1)
    model(micro_batch(9, 0)).square().mean().backward()
    if dist.get_rank() == 1:
        gradient = optimizer.active_parameters[1].gradient
        assert gradient is not None
        (gradient.to_local() if isinstance(gradient, DTensor) else gradient).view(-1)[0] = float("inf")
    optimizer.step()
    return optimizer.non_finite_steps, optimizer.global_step, all(w.isfinite().all() for w in weights(model).values())


def rounded(how: str) -> dict[str, Tensor]:
    """What this process holds of a bf16 model that was rounded stochastically at several switches."""
    model, _ = trained = make(how=how, dtype="bfloat16")
    train(*trained, THREE_EPOCHS)
    return {
        name: (p.to_local() if isinstance(p, DTensor) else p).detach().float() for name, p in model.named_parameters()
    }


def with_unused_parameters() -> dict[str, Tensor]:
    """Weights where only rank 0 uses the second matrix of the layers, like an expert that a router leaves out."""
    model, optimizer = make(how="copies", switch_mode="fixed", start_block=1)
    layer = model.layers[1]
    if dist.get_rank() == 1:
        layer.forward = lambda hidden: hidden + layer.norm(hidden)
    train(model, optimizer, 2)
    return weights(model)


def refused(what: str) -> str:
    """The message for options that sharded parameters cannot have."""
    try:
        if what == "one process":
            dist.destroy_process_group()
            shard_blocks(make_net())
        elif what == "plain model":
            sharded_block_optimizer(make_net(), adamw)
        elif what == "ratio":
            model = shard_blocks(make_net())
            BlockOptimizerRatio(list(model.parameters()), list(model.named_parameters()))
        else:
            options: dict[str, Any] = {
                "rows": {"max_block_parameters": 100},
                "release": {"gradient_release": True},
                "average": {"average_gradients": True},
            }[what]
            make(how="fsdp", **options)
    except InputError as error:
        return str(error)
    return "nothing"


def groups_of(size: int) -> str:
    """The message for groups that the processes cannot be divided into."""
    try:
        mesh_of(size)
    except InputError as error:
        return error.message
    return "nothing"


def every_refusal() -> dict[str, str]:
    return {what: refused(what) for what in ("plain model", "ratio", "rows", "release", "average")}

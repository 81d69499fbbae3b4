"""What a host may have done to a model since its optimizer was built, under which training would silently go wrong."""

from __future__ import annotations

import gc

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from badam.errors import InputError


def replaced_parameters() -> InputError:
    """What to say where the groups hold other parameters than those that the optimizer was built on."""
    return InputError(
        "The parameters were replaced after this optimizer was built, as accelerate does when it shards a "
        "model: the blocks would be those of the old ones.",
        advice="Turn the host's sharding off, and build the optimizer on a model that is sharded before: for a "
        "Trainer by from_pretrained(distributed_config=DistributedConfig(fsdp_size=...)), for a loop of your "
        "own by badam.distributed.shard_blocks. Or use badam-train and a plan for the engine fsdp2.",
    )


def check_nobody_averages(parameter: nn.Parameter) -> None:
    """Refuse a model with ``parameter`` that is wrapped in DDP, for an optimizer that will switch blocks.

    Raises:
        InputError: with what to call instead.
    """
    if ddp_wrappers_of(parameter):
        raise InputError(
            "DistributedDataParallel averages the gradients of the first block alone: from the second one on "
            "the processes would train different models.",
            advice="Call badam.distributed.average_instead_of_ddp(wrapped_model, optimizer) before training, "
            "or use BAdamCallback in a Trainer.",
        )


def ddp_wrappers_of(parameter: nn.Parameter) -> list[DistributedDataParallel]:
    """The wrappers in this process around models with ``parameter`` that average gradients.

    A host that wraps a model shows the wrapper to no optimizer and to no callback, so they are looked for among all
    objects that there are: once in a run, a tenth of a second.
    """
    if not dist.is_available() or not dist.is_initialized():
        return []
    wrappers = [found for found in gc.get_objects() if issubclass(type(found), DistributedDataParallel)]
    return [
        wrapper
        for wrapper in wrappers
        if wrapper.require_backward_grad_sync and any(own is parameter for own in wrapper.parameters())
    ]

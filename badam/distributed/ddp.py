"""Whole copies of a small model in several processes, behind a host that wraps it in ``DistributedDataParallel``.

DDP's reducer knows what was trainable when the model was wrapped: from the second block on it would average nothing,
and the copies would drift apart without a word. Here it is told to stand aside, by its own ``no_sync()``, and the block
optimizer averages the active block's gradients: once per optimizer step, in fp32. Nothing is lost by not overlapping
that with backward: the active block is the last that backward computes.
"""

from __future__ import annotations

from contextlib import ExitStack

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from badam.optim.block import BlockOptimizer


def average_instead_of_ddp(model: nn.Module, optimizer: BlockOptimizer) -> ExitStack:
    """Let ``optimizer`` average gradients in the place of the DDP wrapper ``model``. Collective.

    Args:
        model: wrapped in DDP, or not: then only the optimizer is told.
        optimizer: over the parameters of the model inside.

    Returns:
        What gives DDP its work back when it is closed.

    Raises:
        InputError: with ``gradient_release``.
        RanksDisagree: if the processes would not train the same.
    """
    standing_aside = ExitStack()
    if isinstance(model, DistributedDataParallel):
        standing_aside.enter_context(model.no_sync())
    optimizer.average_over_processes()
    return standing_aside

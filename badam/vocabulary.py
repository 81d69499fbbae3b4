"""The closed sets of words in which memory is predicted, traced, measured and reported."""

from __future__ import annotations

from enum import StrEnum


class Category(StrEnum):
    """What a byte is for. Predicted and measured memory are compared category by category."""

    PARAMETER = "parameter"  # the model's own weights and buffers
    MASTER = "master"  # fp32 copies of the active parameters
    GRADIENT = "gradient"
    OPTIMIZER_STATE = "optimizer state"
    ACTIVATION = "activation"  # saved for backward, checkpoints and recomputed values included
    LOGITS = "logits and loss"
    TEMPORARY = "temporary"  # born and dead inside one operation or module of one phase
    WORKSPACE = "workspace"  # cuBLAS and friends; allocated through torch, never by the model
    CONTEXT = "context"  # the driver's share, outside torch
    CACHE = "cache"  # reserved by the allocator, in no tensor


class Phase(StrEnum):
    """Where in a training step a byte or a second is spent."""

    SETUP = "setup"  # before the first step, and between steps
    FORWARD = "forward"
    LOSS = "loss"  # from the output projection to the scalar
    BACKWARD = "backward"
    RECOMPUTE = "recompute"  # forward again inside backward, for checkpointed layers
    STEP = "step"  # gradient clipping, optimizer update, write-back
    SWITCH = "switch"  # from one block to the next


STEP_PHASES = (Phase.FORWARD, Phase.LOSS, Phase.BACKWARD, Phase.RECOMPUTE, Phase.STEP, Phase.SWITCH)
"""The phases of one training step, in the order in which they are reported."""

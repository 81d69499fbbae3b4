"""The closed sets of words: of plans, and those in which memory is predicted, traced, measured and reported.

Each is said here and nowhere else. This module imports nothing: the commands read it to describe their options.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

Task = Literal["causal-lm", "sequence-classification", "sequence-to-sequence", "image-classification", "speech-to-text"]
Method = Literal["badam", "badam-ratio", "adam", "lora", "qlora", "lomo", "adalomo", "galore", "lisa", "hift", "mezo"]
Engine = Literal["single", "ddp", "fsdp2", "zero3"]
Offload = Literal["none", "optimizer", "all"]
"""What ZeRO-3 keeps in host memory: nothing, the optimizer's state, or the parameters as well."""

BlockStrategy = Literal["layer", "attn-mlp", "matrix"]
"""The ways to cut a model into blocks."""

Strategy = Literal[BlockStrategy, "ratio", "full"]
"""The partitions of a plan; ``ratio`` and ``full`` are one block, of the layers or of everything."""

SwitchMode = Literal["random", "ascending", "descending", "fixed"]
Dtype = Literal["bfloat16", "float16", "float32"]
ELEMENT_BYTES: dict[Dtype, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
Checkpointing = Literal["all", "none", "list"]
"""Which layers are checkpointed; ``list``: those that each block of the plan names."""

Loss = Literal["full", "chunked"]
Attention = Literal["sdpa", "eager"]
WriteBack = Literal["stochastic", "nearest"]
"""How an fp32 master becomes a weight of half precision."""

ModelSource = Literal["catalogue", "hub", "directory", "config"]
Profile = Literal["normal", "full"]
OnLong = Literal["truncate", "drop", "refuse"]
"""What happens to an example that is longer than the plan's length."""

OnBadRow = Literal["refuse", "skip"]
"""What happens to a record that cannot be trained on."""

LossOn = Literal["assistant", "completion", "all"]
"""What is learned of a record."""

Padding = Literal["auto", "plan", "longest"]

TaskChoice = Literal["auto", Task]
PartitionChoice = Literal["auto", BlockStrategy]
CheckpointingChoice = Literal["auto", "all", "none"]
LossChoice = Literal["auto", Loss]
SegmentsChoice = Literal["auto", "on", "off"]
"""Of expandable segments in torch's allocator."""

AttentionChoice = Literal["auto", Attention]
"""What a question to the planner may say of each, or leave to it."""


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

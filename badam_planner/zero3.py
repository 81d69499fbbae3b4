"""From the rehearsal of a step on one card to that of one of N cards under DeepSpeed's ZeRO-3. Pure, no torch.

DeepSpeed gathers matrix by matrix, up to a layer ahead, as badam.distributed.zero3_engine asks it to; norms and biases
stay gathered. What it holds for the active block beside masters and moments are fp32 gradients of this card's part and
buffers of the size of the largest matrix. docs/many-gpus.md has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from badam.naming import ParameterInfo
from badam.plan import Offload
from badam.vocabulary import Category, Phase
from badam_planner.events import NEVER, Allocation, Recording
from badam_planner.parts import STATES, buffer, cut, dealt_out, spread_out
from badam_planner.sharding import (
    ROOT,
    Pass,
    Passes,
    Sharding,
    twin_of,
)
from badam_planner.traffic import Traffic, traffic, traffic_of_everything

BUCKETS = 2
"""Buffers of the size of the largest trained matrix that DeepSpeed keeps while a block is active."""

COPIES = 2
"""Of what is gathered ahead there is the message and, cut out of it, each matrix."""


def partition(recording: Recording, sharding: Sharding, offload: Offload = "none") -> Recording:
    """The recording of one of ``sharding.shards`` cards under ZeRO-3.

    Formula: matrices, masters, moments and temporaries of the step hold ceil(entries / N). A layer is gathered in
    forward and in backward, as a message and as matrices; the head and the embedding in their turn. Whole gradients
    live until the next one is there. The active block has 4 bytes an entry / N of gradients and two buckets, in
    backward also the reordered input of a reduction. Masters, moments and this card's gradients are in host memory if
    ``offload`` is ``optimizer``, and parts of matrices too if it is ``all``.
    Not counted: buffers of the communication library on a card, event and stream objects, what lies in host memory.
    """
    spread = spread_out(recording)

    def part(allocation: Allocation, info: ParameterInfo) -> Allocation | None:
        if offload != "none" and (allocation.category in STATES or (offload == "all" and info.is_matrix)):
            return None
        if allocation.category is Category.PARAMETER and not info.is_matrix:
            return allocation
        return cut(allocation, info, (-(-info.numel // sharding.shards),))

    # The optimizer steps where its states are.
    gradients, allocations = dealt_out(spread, sharding.shapes, sharding.shards, part, steps_here=offload == "none")
    passes = Passes(spread, sharding)
    for one in passes.every:
        allocations += _gathered(one, sharding)
        allocations += _whole_gradients(gradients, allocations, one, passes, sharding)
    allocations += _buffers(sharding, offload)
    allocations.sort(key=lambda allocation: allocation.born)
    return replace(spread, allocations=[each for each in allocations if each.nbytes])


def zero3_traffic(recording: Recording, sharding: Sharding, micro_batches: int) -> tuple[Traffic, Traffic]:
    """What the cards send in a step, and what they would if everything were trained; reduced in the model's type."""
    entry = sharding.entry_bytes
    return traffic(recording, sharding, entry), traffic_of_everything(sharding, micro_batches, entry)


def _gathered(one: Pass, sharding: Sharding) -> Iterator[Allocation]:
    """Matrices that are whole in a micro-batch: a layer's at any time, the head's and the embedding's in their turn."""
    layers = [unit for unit in sharding.units if len(unit.parameters) > 1 and unit.path != ROOT]
    ahead = COPIES * max((_matrix_bytes(unit.parameters, sharding) for unit in layers), default=0)
    yield buffer("a layer gathered ahead", ahead, one.begins + 1, one.turns - 1, Phase.FORWARD, ROOT)
    yield buffer("a layer gathered ahead", ahead, one.turns + 1, one.ends - 1, Phase.BACKWARD, ROOT)
    ticks = [tick for unit, tick in one.forward.items() if unit in layers]
    for unit in sharding.units:
        if unit not in layers and unit.path != ROOT:
            whole = _matrix_bytes(unit.parameters, sharding)
            yield buffer(
                f"gathered {unit.path}", whole, one.begins + 2, min(ticks, default=one.turns), Phase.FORWARD, unit.path
            )
    rest = _matrix_bytes(sharding.units[-1].parameters, sharding)
    until = min((tick for unit, tick in one.backward.items() if unit in layers), default=one.ends)
    yield buffer("gathered head", rest, max(ticks, default=one.turns), until, Phase.LOSS, ROOT)


def _whole_gradients(
    gradients: Sequence[Allocation], allocations: list[Allocation], one: Pass, passes: Passes, sharding: Sharding
) -> list[Allocation]:
    """Autograd's gradients, each until the next one is there; takes the rehearsal's out of ``allocations``."""
    first = passes.every[0]
    members = sorted(gradients, key=lambda gradient: gradient.born)
    found: list[Allocation] = []
    for member in members:
        twin = twin_of(member, allocations, sharding) if one is first else None
        if twin is not None:
            allocations.remove(twin)
        born = (twin or member).born + one.turns - first.turns
        nbytes = math.prod(member.shape) * sharding.entry_bytes
        found.append(replace(member, nbytes=nbytes, born=born, died=one.ends, dtype=sharding.dtype))
    for index, following in enumerate(found[1:]):
        found[index] = replace(found[index], died=following.born + 2)
    if found:
        largest = max(gradient.nbytes for gradient in found)
        begins = min(gradient.born for gradient in found)
        found.append(buffer("input of the reduction", largest, begins + 1, one.ends, Phase.BACKWARD, ROOT))
    return found


def _buffers(sharding: Sharding, offload: Offload) -> Iterator[Allocation]:
    """What DeepSpeed keeps for the active block."""
    trained = [info for unit in sharding.units for info in unit.parameters if info.name in sharding.trained]
    parts = sum(-(-info.numel // sharding.shards) for info in trained)
    largest = max((info.numel for info in trained), default=0)
    gradients = buffer("gradients of this card's part", 4 * parts, 0, NEVER, Phase.SETUP, ROOT)
    if offload == "none":
        yield replace(gradients, category=Category.GRADIENT)
    for _ in range(BUCKETS):
        yield buffer("bucket of gradients", largest * sharding.entry_bytes, 0, NEVER, Phase.SETUP, ROOT)


def _matrix_bytes(parameters: Sequence[ParameterInfo], sharding: Sharding) -> int:
    return sum(info.numel for info in parameters if info.is_matrix) * sharding.entry_bytes

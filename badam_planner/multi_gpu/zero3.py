"""From the rehearsal of a step on one GPU to that of one of N GPUs under DeepSpeed's ZeRO-3. Pure, no torch.

DeepSpeed gathers matrix by matrix, up to a layer ahead, as badam.distributed.deepspeed.engine asks it to; norms and
biases stay gathered. Which are there when, zero3_gathers says. What it holds for the active block beside masters
and moments are fp32 gradients of this GPU's part and buffers of the size of the largest matrix. docs/many-gpus.md has
the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from badam.blocks.names import ParameterInfo
from badam.vocabulary import Category, Offload, Phase
from badam_planner.multi_gpu.fsdp2 import (
    ROOT,
    MicroBatch,
    Passes,
    Sharding,
    twin_of,
)
from badam_planner.multi_gpu.gloo import gloos_copies
from badam_planner.multi_gpu.module_uses import uses_of
from badam_planner.multi_gpu.per_rank import STATES, buffer, cut, on_one_gpu, spread_out
from badam_planner.multi_gpu.slots import Slot
from badam_planner.multi_gpu.traffic import Traffic, traffic, traffic_of_everything
from badam_planner.multi_gpu.zero3_gathers import Gathers, Rules
from badam_planner.recording.recording import NEVER, Allocation, Recording, TensorRole


def partition(
    recording: Recording,
    sharding: Sharding,
    offload: Offload = "none",
    *,
    shares_memory: bool = False,
) -> Recording:
    """The recording of one of ``sharding.shards`` GPUs under ZeRO-3.

    Formula: matrices, masters, moments and temporaries of the step hold ceil(entries / N), vectors these and all of
    their entries. Matrices are whole, and come in messages, when zero3_gathers says so. Whole gradients
    live until the next one is there. The active block has 4 bytes an entry / N of gradients and a bucket, in
    backward also the reordered input of a reduction. Masters, moments and this GPU's gradients are in host memory if
    ``offload`` is ``optimizer``, and all parts of parameters too if it is ``all``.
    On the CPU gloo copies each message, see :func:`badam_planner.multi_gpu.gloo.gloos_copies`.
    Not counted: buffers of the communication library on a GPU, event and stream objects, parts that are copied to the
    GPU to be gathered.

    Args:
        recording: of one GPU alone.
        sharding: of the plan.
        offload: what lies in host memory.
        shares_memory: whether the GPU is the host itself, so that what is offloaded stays; see :func:`on_host`.
    """
    spread = spread_out(recording)
    kept = _kept(sharding)

    def part(allocation: Allocation, info: ParameterInfo) -> Allocation | None:
        if allocation.category is Category.PARAMETER and info.name in kept:
            return allocation
        if offload != "none" and (allocation.category in STATES or offload == "all"):
            return None
        return cut(allocation, info, (_part(info, sharding),))

    # The optimizer steps where its states are.
    gradients, allocations = on_one_gpu(spread, sharding.shapes, sharding.shards, part, steps_here=offload == "none")
    passes = Passes(spread, sharding)
    for micro_batch in passes.micro_batches:
        allocations += _whole(_gathered(passes, micro_batch, sharding), micro_batch, sharding)
        allocations += _whole_gradients(gradients, allocations, micro_batch, passes, sharding)
    allocations += _buffers(sharding, offload, passes)
    if shares_memory:
        allocations += on_host(sharding, offload)
    if sharding.over_gloo:
        allocations += list(gloos_copies(allocations))
    allocations.sort(key=lambda allocation: allocation.born)
    return replace(spread, allocations=[allocation for allocation in allocations if allocation.nbytes])


def zero3_traffic(recording: Recording, sharding: Sharding, micro_batches: int) -> tuple[Traffic, Traffic]:
    """What the GPUs send in a step, and what they would if everything were trained; reduced in the model's type."""
    entry = sharding.element_bytes
    passes = Passes(spread_out(recording), sharding)
    messages = [
        members for micro_batch in passes.micro_batches for members in _gathered(passes, micro_batch, sharding).messages
    ]
    reduced = traffic(recording, sharding, entry)
    own = replace(
        reduced,
        gathers=len(messages),
        gathered_bytes=sum(info.numel for members in messages for info in members) * entry,
    )
    return own, traffic_of_everything(sharding, micro_batches, entry)


def _kept(sharding: Sharding) -> frozenset[str]:
    """Names of the parameters that stay gathered: those up to the size of the largest vector."""
    parameters = sharding.shapes.values()
    most = max((info.numel for info in parameters if not info.is_matrix), default=0)
    return frozenset(info.name for info in parameters if info.numel <= most)


def _gathered(passes: Passes, micro_batch: MicroBatch, sharding: Sharding) -> Gathers:
    """What is gathered in one micro-batch."""
    head_module = sharding.head_module
    roots = {name.partition(".")[0] for name in (*sharding.shapes, head_module)}
    parameters: dict[str, tuple[ParameterInfo, ...]] = {}
    for info in sharding.shapes.values():
        owner = info.name.rpartition(".")[0]
        parameters[owner] = (*parameters.get(owner, ()), info)
    if head_module and head_module not in parameters:  # it shares the matrix of the embedding
        parameters[head_module] = tuple(info for info in sharding.units[-1].parameters if info.is_matrix)[:1]
    layer = _largest_layer(sharding)
    rules = Rules(parameters, sharding.trained, _kept(sharding), sharding.shards, layer, layer)
    return Gathers(uses_of(passes.recording, micro_batch.begins, micro_batch.turns, micro_batch.ends, roots), rules)


def _whole(gathers: Gathers, micro_batch: MicroBatch, sharding: Sharding) -> Iterator[Allocation]:
    """Whole matrices and the messages that bring them, as they are there in a micro-batch."""
    for gathered in gathers.found:
        phase = Phase.FORWARD if gathered.born < micro_batch.turns else Phase.BACKWARD
        died = micro_batch.ends + Slot.LAST if gathered.died is None else gathered.died
        yield buffer(
            gathered.role,
            gathered.numel * sharding.element_bytes,
            born=gathered.born,
            died=died,
            phase=phase,
            engine="zero3",
            module=gathered.parameter.rpartition(".")[0],
            parameter=gathered.parameter,
        )


def _whole_gradients(
    gradients: Sequence[Allocation],
    allocations: list[Allocation],
    micro_batch: MicroBatch,
    passes: Passes,
    sharding: Sharding,
) -> list[Allocation]:
    """Autograd's gradients, each until the next one is there; takes the rehearsal's out of ``allocations``."""
    first = passes.micro_batches[0]
    members = sorted(gradients, key=lambda gradient: gradient.born)
    found: list[Allocation] = []
    for member in members:
        twin = twin_of(member, allocations, sharding) if micro_batch is first else None
        if twin is not None:
            allocations.remove(twin)
        born = (twin or member).born + micro_batch.turns - first.turns
        nbytes = math.prod(member.shape) * sharding.element_bytes
        found.append(replace(member, nbytes=nbytes, born=born, died=micro_batch.ends + Slot.LAST, dtype=sharding.dtype))
    for index, following in enumerate(found[1:]):
        found[index] = replace(found[index], died=following.born + Slot.SECOND)
    if found:
        largest = max(gradient.nbytes for gradient in found)
        begins = min(gradient.born for gradient in found)
        found.append(
            buffer(
                TensorRole.REDUCTION_INPUT,
                largest,
                born=begins + Slot.FIRST,
                died=micro_batch.ends + Slot.LAST,
                phase=Phase.BACKWARD,
                engine="zero3",
            )
        )
    return found


def on_host(sharding: Sharding, offload: Offload) -> list[Allocation]:
    """What a process has in host memory while a block is active.

    Formula: with A entries of the block and M of the model, each in N parts, 20A/N: masters 4, moments 8, gradients 4
    as they are collected and 4 as the step takes them. With ``all`` also the parts of all parameters, 2M/N in bf16.
    Not counted: what is built before DeepSpeed takes the model apart, checkpoints, the process itself; torch's pinned
    memory, in which the step's gradients and the block's parts lie on a GPU, comes in powers of two.
    """
    if offload == "none":
        return []
    parts = _parts(sharding)
    held = [
        (TensorRole.HOST_MASTERS, 4 * parts, Category.MASTER),
        (TensorRole.HOST_MOMENTS, 8 * parts, Category.OPTIMIZER_STATE),
        (TensorRole.HOST_COLLECTED_GRADIENTS, 4 * parts, Category.GRADIENT),
        (TensorRole.HOST_STEP_GRADIENTS, 4 * parts, Category.GRADIENT),
    ]
    if offload == "all":
        parts_of_model = sum(_part(info, sharding) for info in sharding.shapes.values())
        held.append((TensorRole.HOST_PARAMETERS, parts_of_model * sharding.element_bytes, Category.PARAMETER))
    return [_resident(role, nbytes, category) for role, nbytes, category in held]


def _resident(role: TensorRole, nbytes: int, category: Category = Category.WORKSPACE) -> Allocation:
    """What is there from beginning to end."""
    return buffer(role, nbytes, born=0, died=NEVER, phase=Phase.SETUP, engine="zero3", category=category)


def _buffers(sharding: Sharding, offload: Offload, passes: Passes) -> Iterator[Allocation]:
    """What DeepSpeed keeps for the active block on the GPU."""
    largest = max((info.numel for info in _trained(sharding)), default=0)
    yield _resident(TensorRole.GRADIENT_BUCKET, largest * sharding.element_bytes)
    parts = 4 * _parts(sharding)
    if offload == "none":
        yield _resident(TensorRole.GRADIENTS_OF_PART, parts, Category.GRADIENT)
        if sharding.element_bytes == 4:  # DeepSpeed copies fp32 parameters too
            yield _resident(TensorRole.MASTERS_OF_PART, parts, Category.MASTER)
        return
    on_its_way = -(-4 * largest // sharding.shards)
    for micro_batch in passes.micro_batches:
        passing = buffer(
            TensorRole.GRADIENT_TO_HOST,
            on_its_way,
            born=micro_batch.turns + Slot.FIRST,
            died=micro_batch.ends,
            phase=Phase.BACKWARD,
            engine="zero3",
        )
        yield replace(passing, gpu_only=True)


def _trained(sharding: Sharding) -> list[ParameterInfo]:
    return [info for info in sharding.shapes.values() if info.name in sharding.trained]


def _parts(sharding: Sharding) -> int:
    """Entries of the active block that one GPU has."""
    return sum(_part(info, sharding) for info in _trained(sharding))


def _part(info: ParameterInfo, sharding: Sharding) -> int:
    return -(-info.numel // sharding.shards)


def _largest_layer(sharding: Sharding) -> int:
    """Entries of the largest layer, or of the whole model if it has none, which DeepSpeed is told."""
    sizes = [
        sum(info.numel for info in unit.parameters)
        for unit in sharding.units
        if unit.path != ROOT and len(unit.parameters) > 1
    ]
    return max(sizes, default=sum(info.numel for info in sharding.shapes.values()))

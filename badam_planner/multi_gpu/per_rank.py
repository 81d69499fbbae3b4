"""What both engines that cut a model do to a rehearsal: who has which part, and room for what they add. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from badam.blocks.names import ParameterInfo
from badam.vocabulary import Category, Engine, Phase
from badam_planner.multi_gpu.slots import SPREAD
from badam_planner.recording.recording import NEVER, Allocation, Recording, TensorRole

STATES = (Category.MASTER, Category.OPTIMIZER_STATE, Category.GRADIENT)


def spread_out(recording: Recording) -> Recording:
    """The same recording with room between its ticks."""
    return replace(
        recording,
        allocations=[
            replace(one, born=one.born * SPREAD, died=NEVER if one.died == NEVER else one.died * SPREAD)
            for one in recording.allocations
        ],
        phase_starts=[(tick * SPREAD, phase) for tick, phase in recording.phase_starts],
        layer_marks=[replace(mark, tick=mark.tick * SPREAD) for mark in recording.layer_marks],
        end=recording.end * SPREAD,
    )


def on_one_gpu(
    recording: Recording,
    shapes: Mapping[str, ParameterInfo],
    shards: int,
    part: Callable[[Allocation, ParameterInfo], Allocation | None],
    *,
    steps_here: bool = True,
) -> tuple[list[Allocation], list[Allocation]]:
    """Autograd's gradients, which are whole in backward, and everything else as one GPU has it.

    Args:
        recording: with its parts spread out, see :func:`spread_out`.
        shapes: the model's parameters by name.
        shards: GPUs that temporaries are distributed over.
        part: this GPU's part of a parameter or of its state, None if that is not on the GPU.
        steps_here: whether the temporaries of step and switch are on the GPU.
    """
    gradients: list[Allocation] = []
    others: list[Allocation | None] = []
    for allocation in recording.allocations:
        info = shapes.get(allocation.parameter)
        if allocation.category is Category.GRADIENT and allocation.phase is Phase.BACKWARD and info is not None:
            gradients.append(allocation)
        elif info is not None and allocation.category in (Category.PARAMETER, *STATES):
            others.append(part(allocation, info))
        elif allocation.phase not in (Phase.STEP, Phase.SWITCH) or allocation.category is not None:
            others.append(allocation)
        elif steps_here:
            others.append(replace(allocation, nbytes=-(-allocation.nbytes // shards)))
    return gradients, [allocation for allocation in others if allocation is not None]


def cut(allocation: Allocation, info: ParameterInfo, shape: tuple[int, ...]) -> Allocation:
    """A parameter, or what belongs to each of its entries, cut to ``shape``; a step counter stays what it is."""
    if math.prod(allocation.shape) != info.numel:
        return allocation
    entry = allocation.nbytes // max(info.numel, 1)
    return replace(allocation, nbytes=entry * math.prod(shape), shape=shape)


def buffer(
    role: TensorRole,
    nbytes: int,
    *,
    born: int,
    died: int,
    phase: Phase,
    engine: Engine,
    module: str = "",
    parameter: str = "",
    category: Category = Category.WORKSPACE,
) -> Allocation:
    """What an engine holds besides the rehearsal's allocations, in ticks of a recording that was spread out.

    Args:
        role, nbytes, born, died, phase, category: as of any allocation.
        engine: that makes it.
        module: that runs meanwhile.
        parameter: what it is of: a parameter, or the module whose parameters it has.
    """
    return Allocation(
        nbytes,
        born,
        died,
        phase,
        module,
        operation=engine,
        shape=(nbytes,),
        dtype="uint8",
        category=category,
        role=role,
        parameter=parameter,
    )

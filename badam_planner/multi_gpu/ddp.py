"""From the rehearsal of a step on one GPU to that of one of several with a whole copy each. Pure, no torch."""

from __future__ import annotations

import math
from dataclasses import replace

from badam.vocabulary import Category, Phase
from badam_planner.multi_gpu.per_rank import buffer, spread_out
from badam_planner.multi_gpu.slots import Slot
from badam_planner.recording.recording import Recording, TensorRole


def replicate(recording: Recording) -> Recording:
    """The recording of a GPU with a whole copy: the active block's fp32 gradients are averaged in one message.

    Formula: 4 bytes per active entry more, while they are averaged at the start of the step.
    """
    spread = spread_out(recording)
    step = _last_step(spread)
    numel = sum(
        math.prod(allocation.shape)
        for allocation in spread.allocations
        if allocation.category is Category.GRADIENT and allocation.born < step <= allocation.died
    )
    message = buffer(
        TensorRole.GRADIENTS_IN_ONE_MESSAGE,
        4 * numel,
        born=step + Slot.FIRST,
        died=step + Slot.SECOND,
        phase=Phase.STEP,
        engine="ddp",
    )
    return replace(spread, allocations=sorted([*spread.allocations, message], key=lambda allocation: allocation.born))


def _last_step(recording: Recording) -> int:
    forward = max(tick for tick, phase in recording.phase_starts if phase is Phase.FORWARD)
    return next(tick for tick, phase in recording.phase_starts if phase is Phase.STEP and tick > forward)

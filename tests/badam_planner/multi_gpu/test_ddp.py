"""One rank's recording with a whole copy of the model, from a step that is written by hand."""

from __future__ import annotations

from badam.vocabulary import Phase
from badam_planner.multi_gpu.ddp import replicate
from badam_planner.multi_gpu.per_rank import spread_out
from badam_planner.recording.forecast import forecast
from badam_planner.recording.recording import TensorRole
from tests.badam_planner.multi_gpu.models import MATRIX, one_gpu_step
from tests.badam_planner.multi_gpu.targets import CPU


def test_gradients_are_averaged_in_one_message_at_the_start_of_the_step() -> None:
    alone = one_gpu_step()
    together = replicate(alone)
    known = spread_out(alone).allocations
    (message,) = [one for one in together.allocations if one not in known]
    step = next(tick for tick, phase in together.phase_starts if phase is Phase.STEP)
    following = min(one.born for one in together.allocations if one.born > message.born)
    assert (message.role, message.nbytes) == (TensorRole.GRADIENTS_IN_ONE_MESSAGE, 4 * MATRIX)
    assert step < message.born < message.died <= following


def test_the_message_is_made_outside_of_the_modules_by_the_engine() -> None:
    recording = replicate(one_gpu_step())
    (message,) = [one for one in recording.allocations if one.role is TensorRole.GRADIENTS_IN_ONE_MESSAGE]
    assert (message.module, message.operation) == ("", "ddp")
    for one in recording.allocations:  # so that the message is the highest point of the step
        if one.role is None:
            one.nbytes = 0
    found = forecast(recording, CPU, head_module="head")
    assert (found.peak_phase, found.peak_module) == (Phase.STEP, "")

"""In which order a micro-batch goes through the modules, read from where it allocates."""

from __future__ import annotations

from badam.vocabulary import Phase
from badam_planner.multi_gpu.module_uses import Use, uses_of
from badam_planner.multi_gpu.per_rank import spread_out
from badam_planner.multi_gpu.slots import SPREAD, Slot
from badam_planner.recording.recording import Recording
from tests.badam_planner.recording.recordings import Script

LAYER = "model.layers.0"


def one_layer(*, checkpointed: bool = False) -> Recording:
    """Forward and backward through an embedding, a layer with two products, and a head."""
    script = Script()
    script.phase(Phase.FORWARD)
    script.birth(1, "model.embed")
    script.mark("forward", LAYER)
    for module in (f"{LAYER}.mlp.up", f"{LAYER}.mlp.down"):
        script.birth(1, module)
    script.birth(1, "head")
    script.phase(Phase.BACKWARD)
    script.birth(1, "head")
    script.mark("backward", LAYER)
    if checkpointed:
        script.phase(Phase.RECOMPUTE)
        for module in (f"{LAYER}.mlp.up", f"{LAYER}.mlp.down"):
            script.birth(1, module)
        script.phase(Phase.BACKWARD)
    for module in (f"{LAYER}.mlp.down", f"{LAYER}.mlp.up"):
        script.birth(1, module)
    script.phase(Phase.STEP)
    return spread_out(script.recording)


def uses(recording: Recording) -> list[Use]:
    begins, turns, ends = (
        next(tick for tick, phase in recording.phase_starts if phase is wanted)
        for wanted in (Phase.FORWARD, Phase.BACKWARD, Phase.STEP)
    )
    return uses_of(recording, begins, turns, ends, ("model", "head"))


def path(found: list[Use]) -> list[str]:
    """``+`` where a module begins and ``-`` where it ends; the model itself left out."""
    return [f"{'+' if use.fetches else '-'}{use.module.removeprefix('model.')}" for use in found if use.module]


def test_forward_enters_and_leaves_modules_as_they_lie_in_each_other() -> None:
    forward = [use for use in uses(one_layer()) if use.is_forward]
    assert path(forward) == [
        "+model", "+embed", "-embed",
        "+layers.0", "+layers.0.mlp", "+layers.0.mlp.up", "-layers.0.mlp.up", "+layers.0.mlp.down",
        "-layers.0.mlp.down", "-layers.0.mlp", "-layers.0", "-model",
        "+head", "-head",
    ]  # fmt: skip
    assert forward[0].module == forward[-1].module == ""


def test_a_module_begins_before_its_first_tensor_and_ends_after_its_last() -> None:
    recording = one_layer()
    made = next(one for one in recording.allocations if one.module.endswith("mlp.up") and one.phase is Phase.FORWARD)
    begin, end = [use.tick for use in uses(recording) if use.module == made.module and use.is_forward]
    assert (begin, end) == (made.born + Slot.MODULE_BEGINS, made.born + Slot.MODULE_LEFT)


def test_backward_goes_through_a_layer_in_the_reverse_of_its_forward() -> None:
    backward = [use for use in uses(one_layer()) if not use.is_forward and use.fetches]
    assert [use.module for use in backward if use.module.startswith(LAYER)] == [
        LAYER, f"{LAYER}.mlp", f"{LAYER}.mlp.down", f"{LAYER}.mlp.up",
    ]  # fmt: skip


def test_a_checkpointed_layer_computes_forward_again_within_the_backward_of_its_last_module() -> None:
    found = uses(one_layer(checkpointed=True))
    again = [use for use in found if use.recomputes and use.fetches]
    assert [use.module for use in again] == [f"{LAYER}.mlp", f"{LAYER}.mlp.up", f"{LAYER}.mlp.down"]
    started = next(use for use in found if not use.is_forward and use.module == f"{LAYER}.mlp.down")
    assert started.tick < again[0].tick
    assert not any(use.recomputes for use in uses(one_layer()))


def test_all_that_begins_ends_and_time_does_not_run_back() -> None:
    for recording in (one_layer(), one_layer(checkpointed=True)):
        found = uses(recording)
        forward = [use for use in found if use.is_forward and not use.recomputes][:16]
        ticks = [use.tick for use in forward]
        assert ticks == sorted(ticks)
        assert all(abs(use.tick) <= recording.end + SPREAD for use in found)
        open_modules: list[str] = []
        for use in forward:
            if use.fetches:
                open_modules.append(use.module)
            else:
                assert open_modules.pop() == use.module
        assert open_modules == []

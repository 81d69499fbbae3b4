"""How a recording is cut into the passages of four equal layers."""

from __future__ import annotations

from itertools import groupby

import pytest

from badam.vocabulary import Category, Phase
from badam_planner.composition.layer_cycles import (
    COMPARED,
    LAST,
    REPEATED,
    LayerCycles,
    NotPeriodic,
    Reference,
    times_of_cycle,
)
from badam_planner.recording.recording import Recording, TensorRole
from tests.badam_planner.composition.layered import Layer, Make, simulated
from tests.badam_planner.recording.recordings import Script

CYCLES = tuple((f"layers.{number}",) for number in range(4))
SAVED = Layer(forward=(Make(5, "own backward"),), backward=(Make(3, "at once"),))


def stacked(layer: Layer, **options: int) -> Recording:
    return simulated(CYCLES, [layer], [], passes=options.get("passes", 1), order="by layer")


def passages(cycles: LayerCycles) -> list[tuple[int | None, str | None]]:
    return [key for key, _ in groupby((span.cycle, span.kind) for span in cycles.spans)]


def test_forward_passes_the_cycles_upwards_and_backward_down() -> None:
    passing = ("forward", "backward")
    found = [passage for passage in passages(LayerCycles(stacked(SAVED), CYCLES)) if passage[1] in passing]
    assert found == [(number, "forward") for number in range(4)] + [(number, "backward") for number in (3, 2, 1, 0)]


def test_a_release_refers_to_what_its_own_or_a_neighbouring_cycle_made() -> None:
    own = LayerCycles(stacked(SAVED), CYCLES)
    middle = [item.reference for span in own.spans if span.cycle == REPEATED for item in span.items]
    assert Reference(0, (0, 0)) in middle
    handed_on = LayerCycles(stacked(Layer(forward=(Make(5, "next forward"),))), CYCLES)
    middle = [item.reference for span in handed_on.spans if span.cycle == REPEATED for item in span.items]
    assert Reference(-1, (0, 0)) in middle


def test_equal_layers_are_alike() -> None:
    LayerCycles(stacked(SAVED), CYCLES).check_alike()


@pytest.mark.parametrize("place", [COMPARED, REPEATED])
def test_middle_cycles_that_differ_by_one_byte_are_not_alike(place: int) -> None:
    recording = stacked(SAVED)
    odd = next(one for one in recording.allocations if one.module.startswith(f"layers.{place}."))
    odd.nbytes += 1
    with pytest.raises(NotPeriodic, match=r"layers\.1 and layers\.2 behave differently"):
        LayerCycles(recording, CYCLES).check_alike()


def test_the_ends_may_differ() -> None:
    recording = stacked(SAVED)
    for one in recording.allocations:
        one.nbytes += one.module.startswith(("layers.0.", "layers.3."))
    LayerCycles(recording, CYCLES).check_alike()


def test_a_release_two_cycles_away_is_not_periodic() -> None:
    script = Script()
    script.phase(Phase.FORWARD)
    made = []
    for (layer,) in CYCLES:
        script.mark("forward", layer)
        made.append(script.birth(5, layer))
        if layer == CYCLES[LAST][0]:
            script.death(made[0])
    with pytest.raises(NotPeriodic, match=r"layers\.3 releases what layers\.0 made"):
        LayerCycles(script.recording, CYCLES)


def updated(**named: object) -> Recording:
    """An update that makes something for one layer after the other."""
    script = Script()
    script.phase(Phase.FORWARD)
    for (layer,) in CYCLES:
        script.mark("forward", layer)
    script.phase(Phase.STEP)
    for (layer,) in CYCLES:
        script.birth(4, **{key: value.format(layer) if key != "role" else value for key, value in named.items()})
    return script.recording


@pytest.mark.parametrize(
    "named",
    [{"role": TensorRole.STATE, "state": "exp_avg", "parameter": "{}.weight"}, {"owner": "{}"}],
    ids=["by its parameter", "by the layer it was computed from"],
)
def test_what_an_update_makes_for_a_layer_belongs_to_its_cycle(named: dict[str, object]) -> None:
    found = LayerCycles(updated(**named), CYCLES)
    assert [span.cycle for span in found.spans if span.kind == "aside"] == [0, 1, 2, 3]


def test_the_name_of_a_parameter_counts_and_not_the_text_of_its_state() -> None:
    named = {"role": TensorRole.STATE, "state": "layers.1", "parameter": "head.weight", "category": Category.MASTER}
    found = LayerCycles(updated(**{**named, "category": "{}"}), CYCLES)
    assert [span for span in found.spans if span.kind == "aside"] == []


def test_of_four_cycles_the_second_in_the_middle_stands_for_all_that_are_left_out() -> None:
    assert [[times_of_cycle(cycle, total) for cycle in range(4)] for total in (2, 3, 4, 32)] == [
        [1, 0, 0, 1],
        [1, 1, 0, 1],
        [1, 1, 1, 1],
        [1, 1, 29, 1],
    ]

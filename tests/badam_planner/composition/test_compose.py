from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from badam.vocabulary import Phase
from badam_planner.composition.compose import KEPT_CYCLES, NotPeriodic, Run, compose, find_runs
from badam_planner.composition.renaming import renamed
from badam_planner.recording.recording import Recording
from tests.badam_planner.composition.layered import ORDERS, Layer, Make, Step, kinds_of_layers, simulated


def stack(length: int, name: str = "model.layers") -> list[str]:
    return [f"{name}.{index}" for index in range(length)]


def run_of(cycles: int, period: int = 1) -> Run:
    layers = stack(cycles * period)
    return Run(tuple(tuple(layers[at : at + period]) for at in range(0, len(layers), period)))


# -- runs


@given(st.lists(st.sampled_from(["a", "b", None]), max_size=40))
def test_runs_are_disjoint_repetitions_of_at_least_two_cycles(roles: list[str | None]) -> None:
    layers = stack(len(roles))
    role_of = dict(zip(layers, roles, strict=True))
    runs = find_runs(layers, roles)
    members = [layer for run in runs for cycle in run.cycles for layer in cycle]
    assert members == sorted(set(members), key=layers.index)
    for run in runs:
        assert len(run.cycles) >= 2
        shapes = {tuple(role_of[layer] for layer in cycle) for cycle in run.cycles}
        assert len(shapes) == 1
        assert None not in shapes.pop()
        flat = list(chain(*run.cycles))
        assert flat == layers[layers.index(flat[0]) : layers.index(flat[-1]) + 1]


@given(st.integers(2, 20), st.integers(1, 3))
def test_what_is_rehearsed_and_what_is_left_out_make_up_the_run(cycles: int, period: int) -> None:
    run = run_of(cycles, period)
    kept = [cycle for cycle in run.stand_ins() if not cycle[0].startswith("unused.")]
    assert len(run.stand_ins()) == KEPT_CYCLES
    assert set(run.left_out.values()) <= set(chain(*kept))
    assert set(chain(*kept)) | set(run.left_out) == set(chain(*run.cycles))
    assert not set(chain(*kept)) & set(run.left_out)
    assert len(kept) == min(cycles, KEPT_CYCLES)
    assert (kept[0], kept[-1]) == (run.cycles[0], run.cycles[-1])


def test_equal_layers_are_one_run() -> None:
    assert find_runs(stack(32), ["a"] * 32) == [run_of(32)]


def test_alternating_kinds_are_a_run_of_pairs() -> None:
    assert find_runs(stack(10), ["a", "b"] * 5) == [run_of(5, period=2)]


def test_the_active_layer_parts_two_runs() -> None:
    runs = find_runs(stack(11), [*"bbbbb", None, *"aaaaa"])
    assert [len(run.cycles) for run in runs] == [5, 5]
    assert runs[1].cycles[0] == ("model.layers.6",)


def test_the_shortest_period_that_explains_a_run_is_taken() -> None:
    assert [len(cycle) for run in find_runs(stack(12), ["a"] * 12) for cycle in run.cycles] == [1] * 12


@pytest.mark.parametrize("roles", [[], ["a"], ["a", "b", "c"], [None] * 9])
def test_what_does_not_repeat_is_no_run(roles: list[str | None]) -> None:
    assert find_runs(stack(len(roles)), roles) == []


# -- composing

SETTINGS = settings(max_examples=120, deadline=None)
PLAIN = Layer((Make(5, "at once"), Make(9, "own backward")), (Make(3, "previous backward"),), flops=2)


@SETTINGS
@given(st.data(), st.integers(2, 9), st.integers(1, 3), st.integers(1, 2), st.sampled_from(ORDERS))
def test_a_short_recording_is_composed_to_exactly_the_long_one(
    data: st.DataObject, cycles: int, period: int, passes: int, order: str
) -> None:
    kinds = data.draw(kinds_of_layers(period))
    run = run_of(cycles, period)
    given_names = list(chain(*run.cycles))
    short = simulated(run.stand_ins(), kinds, given_names, passes=passes, order=order)
    long = simulated(run.cycles, kinds, given_names, passes=passes, order=order)
    assert compose(short, run) == long


def test_two_runs_of_one_model_are_composed_one_after_the_other() -> None:
    frozen, passing = Layer((Make(4, "at once"), Make(6, "next forward"))), PLAIN
    layers = stack(17)
    below, above = Run(tuple((layer,) for layer in layers[:7])), Run(tuple((layer,) for layer in layers[8:]))

    def step(lower: Sequence[str], upper: Sequence[str]) -> Recording:
        class Mixed(Step):
            def kind(self, place: int) -> Layer:
                return frozen if place < len(lower) else passing

            def backward(self, place: int) -> None:
                if place >= len(lower):
                    super().backward(place)

        return Mixed([*lower, layers[7], *upper], ()).recording(layers)

    short = step(list(chain(*below.stand_ins())), list(chain(*above.stand_ins())))
    assert compose(compose(short, below), above) == step(layers[:7], layers[8:])


def test_layers_ten_and_one_are_not_confused() -> None:
    run = run_of(12)
    composed = compose(simulated(run.stand_ins(), [PLAIN], [], passes=1, order="by layer"), run)
    modules = [one.module for one in composed.allocations if one.nbytes == 9]
    assert modules == [f"model.layers.{index}.mlp" for index in range(12)]


def test_flops_are_counted_for_every_layer() -> None:
    run = run_of(12)
    composed = compose(simulated(run.stand_ins(), [PLAIN], [], passes=3, order="by layer"), run)
    assert {composed.flops[Phase.FORWARD, f"{layer}.mlp"] for layer in stack(12)} == {6}
    assert len(composed.flops) == 24


# -- what cannot be composed


def refused(kinds: Sequence[Layer]) -> bool:
    """Whether four layers of ``kinds`` are refused as the stand-ins of ten equal ones."""
    run = run_of(10)
    try:
        compose(simulated(run.stand_ins(), kinds, [], passes=1, order="by layer"), run)
    except NotPeriodic:
        return True
    return False


@pytest.mark.parametrize(
    "other",
    [
        replace(PLAIN, forward=(Make(6, "at once"), Make(9, "own backward"))),
        replace(PLAIN, forward=(Make(9, "own backward"), Make(5, "at once"))),
        replace(PLAIN, forward=PLAIN.forward[:1]),
        replace(PLAIN, forward=(Make(5, "at once"), Make(9, "never"))),
        replace(PLAIN, forward=(Make(5, "at once"), Make(9, "step"))),
        replace(PLAIN, backward=(Make(3, "at once"),)),
        replace(PLAIN, forward=(Make(5, "at once", named=True), Make(9, "own backward"))),
        replace(PLAIN, recomputed=()),
    ],
    ids=["size", "order", "number", "never released", "released elsewhere", "released at once", "name", "recomputed"],
)
def test_middle_layers_that_differ_are_refused(other: Layer) -> None:
    assert not refused([PLAIN])
    assert refused([PLAIN, PLAIN, other, PLAIN])


def four_layers(**interference: int) -> Recording:
    """Four layers; what the layer called ``made`` makes is released in the backward of the one called ``released``."""
    run = run_of(10)
    made = -1

    class Crossing(Step):
        def forward(self, place: int) -> None:
            nonlocal made
            super().forward(place)
            if place == interference.get("made"):
                made = self.script.birth(1, "far")

        def backward(self, place: int) -> None:
            super().backward(place)
            if place == interference.get("released"):
                self.script.death(made)

    return Crossing([layer for (layer,) in run.stand_ins()], [PLAIN]).recording([])


@pytest.mark.parametrize(("made", "released"), [(3, 0), (3, 1), (2, 0), (1, 3), (0, 2), (0, 3)])
def test_a_lifetime_across_more_than_a_neighbour_is_refused(made: int, released: int) -> None:
    with pytest.raises(NotPeriodic):
        compose(four_layers(made=made, released=released), run_of(10))


@pytest.mark.parametrize("passage", ["forward", "backward"])
def test_what_all_layers_keep_until_a_passage_through_the_stack_ends_is_refused(passage: str) -> None:
    run = run_of(10)

    class Collecting(Step):
        def forward(self, place: int) -> None:
            super().forward(place)
            self.due.setdefault((-2, "collected"), []).append(self.script.birth(1, "collected"))
            if passage == "forward" and place == len(self.layers) - 1:
                self.settle(-2, "collected")

        def backward(self, place: int) -> None:
            super().backward(place)
            if passage == "backward" and place == 0:
                self.settle(-2, "collected")

    recording = Collecting([layer for (layer,) in run.stand_ins()], [PLAIN]).recording([])
    with pytest.raises(NotPeriodic, match=r"releases what model\.layers\.\d made"):
        compose(recording, run)


@pytest.mark.parametrize("places", [(1,), (2,), (1, 2)])
def test_middle_layers_that_release_what_no_layer_made_are_refused(places: tuple[int, ...]) -> None:
    run = run_of(10)

    class Borrowing(Step):
        def backward(self, place: int) -> None:
            super().backward(place)
            if place in places:
                self.script.death(place)

    recording = Borrowing([layer for (layer,) in run.stand_ins()], [PLAIN]).recording(["a", "b", "c"])
    with pytest.raises(NotPeriodic, match="releases what no layer made"):
        compose(recording, run)


def test_a_phase_that_begins_between_middle_layers_is_refused() -> None:
    run = run_of(10)

    class Interrupted(Step):
        def forward(self, place: int) -> None:
            super().forward(place)
            self.script.phase(Phase.SETUP)
            self.script.death(self.script.birth(99))
            self.script.phase(Phase.FORWARD)

    recording = Interrupted([layer for (layer,) in run.stand_ins()], [PLAIN]).recording([])
    with pytest.raises(NotPeriodic, match=r"something happens between model\.layers\.2 and its neighbours"):
        compose(recording, run)


# -- other names


def test_a_renamed_recording_is_the_same_step_of_other_layers() -> None:
    kinds = [Layer((Make(5, "own backward", named=True),), (Make(3, "step", named=True),), flops=3)]
    old, new = [("a.1",), ("a.2",), ("a.3",)], [("a.2",), ("a.3",), ("a.11",)]
    names = {"a.1": "a.2", "a.2": "a.3", "a.3": "a.11"}
    recording = simulated(old, kinds, ["a.1", "a.2"], passes=1, order="by layer")
    assert renamed(recording, names) == simulated(new, kinds, ["a.1", "a.2"], passes=1, order="by layer")


def test_the_same_names_change_nothing() -> None:
    recording = simulated([("a.1",)], [PLAIN], [], passes=1, order="by layer")
    assert renamed(recording, {"a.1": "a.1"}) is recording

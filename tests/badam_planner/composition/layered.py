"""A simulated training step over a stack of layers: which layer makes what, and where it dies, is drawn or given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from hypothesis import strategies as st

from badam.vocabulary import Category, Phase
from badam_planner.recording.recording import GIVEN, Recording, TensorRole
from tests.badam_planner.recording.recordings import Script

Fate = Literal["at once", "next forward", "next backward", "own backward", "previous backward", "step", "never"]
FROM_FORWARD: tuple[Fate, ...] = (
    "at once", "next forward", "next backward", "own backward", "previous backward", "step", "never",
)  # fmt: skip
FROM_BACKWARD: tuple[Fate, ...] = ("at once", "previous backward", "step", "never")
Order = Literal["by layer", "by layer, from the last", "by tensor", "by tensor, from the last layer"]
ORDERS: tuple[Order, ...] = ("by layer", "by layer, from the last", "by tensor", "by tensor, from the last layer")


@dataclass(frozen=True)
class Make:
    """One allocation of a layer and where it dies."""

    nbytes: int
    fate: Fate
    named: bool = False


@dataclass(frozen=True)
class Layer:
    """What every layer of one kind does; the lists are allocations in order."""

    forward: tuple[Make, ...] = ()
    backward: tuple[Make, ...] = ()
    recomputed: tuple[Make, ...] | None = None  # None: the layer is not checkpointed
    flops: int = 0


@dataclass
class Step:
    """Writes the recording of a step over ``layers``, which play ``kinds`` in turn."""

    layers: Sequence[str]
    kinds: Sequence[Layer]
    passes: int = 1
    order: Order = "by layer"
    script: Script = field(default_factory=Script)
    due: dict[tuple[int, str], list[int]] = field(default_factory=dict)
    at_step: list[tuple[int, int]] = field(default_factory=list)  # (layer, allocation)

    def recording(self, given: Sequence[str]) -> Recording:
        """The step, after the parameters of the layers called ``given`` came into being."""
        script = self.script
        for name in given:
            script.birth(
                7, operation=GIVEN, category=Category.PARAMETER, role=TensorRole.PARAMETER, parameter=f"{name}.weight"
            )
        for _ in range(self.passes):
            script.phase(Phase.FORWARD)
            embedded = script.birth(11, "embed")
            for place in range(len(self.layers)):
                self.forward(place)
            logits = script.birth(13, "head")
            script.phase(Phase.LOSS)
            self.settle(len(self.layers), "forward")
            script.phase(Phase.BACKWARD)
            script.death(logits)
            self.settle(len(self.layers), "backward")
            for place in reversed(range(len(self.layers))):
                self.backward(place)
            script.death(embedded)
            self.settle(-1, "backward")
        script.phase(Phase.STEP)
        self.release_at_step()
        script.birth(17)
        return script.recording

    def forward(self, place: int) -> None:
        self.script.mark("forward", self.layers[place])
        self.settle(place, "forward")
        self.make(place, self.kind(place).forward, Phase.FORWARD)

    def backward(self, place: int) -> None:
        kind = self.kind(place)
        self.script.mark("backward", self.layers[place])
        if kind.recomputed is not None:
            self.script.phase(Phase.RECOMPUTE)
            self.make(place, kind.recomputed, Phase.RECOMPUTE)
            self.script.phase(Phase.BACKWARD)
        self.make(place, kind.backward, Phase.BACKWARD)
        self.settle(place, "backward")

    def kind(self, place: int) -> Layer:
        return self.kinds[place % len(self.kinds)]

    def make(self, place: int, makes: Sequence[Make], phase: Phase) -> None:
        layer = self.layers[place]
        for make in makes:
            named = {"role": TensorRole.STATE, "state": "something", "parameter": f"{layer}.w"} if make.named else {}
            index = self.script.birth(make.nbytes, f"{layer}.mlp", **named)
            if make.fate == "at once":
                self.script.death(index)
            elif make.fate == "step":
                self.at_step.append((place, index))
            elif make.fate != "never":
                whose, passage = make.fate.split()
                where = {"own": place, "next": place + 1, "previous": place - 1}[whose]
                self.due.setdefault((where, passage), []).append(index)
        flops = self.script.recording.flops
        flops[phase, f"{layer}.mlp"] = flops.get((phase, f"{layer}.mlp"), 0) + self.kind(place).flops

    def settle(self, place: int, passage: str) -> None:
        """Release what dies when this layer's passage is on; beyond the stack, what its neighbours would have."""
        self.script.death(*self.due.pop((place, passage), []))

    def release_at_step(self) -> None:
        sign = -1 if self.order.endswith("from the last layer") or self.order.endswith("from the last") else 1
        if self.order.startswith("by layer"):
            at_step = sorted(self.at_step, key=lambda pair: (sign * pair[0], pair[1]))
        else:
            ordinals: dict[int, int] = {}
            numbered = []
            for place, index in sorted(self.at_step, key=lambda pair: pair[1]):
                numbered.append((ordinals.setdefault(place, 0), sign * place, index))
                ordinals[place] += 1
            at_step = [(place, index) for _, place, index in sorted(numbered)]
        self.script.death(*(index for _, index in at_step))


def simulated(
    cycles: Sequence[Sequence[str]], kinds: Sequence[Layer], given: Sequence[str], *, passes: int, order: Order
) -> Recording:
    """A step over the layers of ``cycles``."""
    return Step([layer for cycle in cycles for layer in cycle], kinds, passes, order).recording(given)


@st.composite
def kinds_of_layers(draw: st.DrawFn, period: int) -> tuple[Layer, ...]:
    """``period`` kinds of layers, each with a few allocations of any fate."""

    def makes(fates: Sequence[Fate]) -> st.SearchStrategy[tuple[Make, ...]]:
        one = st.builds(Make, st.integers(0, 99), st.sampled_from(fates), st.booleans())
        return st.lists(one, max_size=4).map(tuple)

    layer = st.builds(
        Layer, makes(FROM_FORWARD), makes(FROM_BACKWARD), st.none() | makes(FROM_BACKWARD), st.integers(0, 9)
    )
    return tuple(draw(layer) for _ in range(period))

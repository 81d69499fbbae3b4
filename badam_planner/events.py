"""What a rehearsal records: allocations with a birth, a death and a meaning. Pure data, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from badam.vocabulary import Category, Phase

NEVER = -1
"""``died`` of an allocation that outlives the recording."""


GIVEN = "given"
"""``operation`` of what existed before the recording began."""


@dataclass(slots=True)
class Allocation:
    """One storage: ``nbytes`` bytes alive from clock tick ``born`` until, not including, tick ``died``."""

    nbytes: int
    born: int
    died: int
    phase: Phase  # at birth
    module: str  # path of the module that ran; "" outside of every module
    operation: str  # the operator that made it, such as "aten.mm"
    shape: tuple[int, ...]
    dtype: str
    category: Category | None = None  # None until something is known about it
    label: str | None = None  # a name that a person understands, where there is one
    card_only: bool = False  # scratch of a card's kernel; a CPU takes none of it

    def describe(self) -> str:
        """A name for reports: the label, or where and by which operator it was made, with its shape."""
        operator = self.operation.removeprefix("aten.").split(".")[0].strip("_")
        what = self.label or f"{self.module or 'outside the modules'}: {operator}"
        return f"{what} {'×'.join(map(str, self.shape)) or 'scalar'} {self.dtype}"


@dataclass(frozen=True, slots=True)
class LayerMark:
    """The tick at which a layer's forward or backward begins."""

    tick: int
    kind: Literal["forward", "backward"]
    layer: str  # module path


Flops = dict[tuple[Phase, str], int]
"""Operations of matrix products by phase and module path; 2 m n k each (``torch.utils.flop_counter``)."""


@dataclass(frozen=True, slots=True)
class MemoryTraffic:
    """What operators move: bytes of the tensors that they read and write, and how many operators there were."""

    product_bytes: int = 0  # of matrix products, convolutions and attention
    other_bytes: int = 0
    operators: int = 0

    def __add__(self, other: MemoryTraffic) -> MemoryTraffic:
        return MemoryTraffic(
            self.product_bytes + other.product_bytes,
            self.other_bytes + other.other_bytes,
            self.operators + other.operators,
        )


class Entries(NamedTuple):
    """How many numbers a method treats in its own ways."""

    trained: int  # at a time
    quantized: int  # kept in fewer than 16 bits


@dataclass(slots=True)
class Recording:
    """A rehearsal's events: allocations in order of birth, and when each phase and each layer began.

    One tick of the clock is one birth, one death, one mark or one beginning of a phase: the ticks' order is total.
    """

    allocations: list[Allocation] = field(default_factory=list)
    phase_starts: list[tuple[int, Phase]] = field(default_factory=lambda: [(0, Phase.SETUP)])
    layer_marks: list[LayerMark] = field(default_factory=list)
    flops: Flops = field(default_factory=dict)
    traffic: dict[tuple[Phase, str], MemoryTraffic] = field(default_factory=dict)  # by phase and module path
    entries: Entries | None = None  # of a rehearsal at full depth
    end: int = 1  # the next tick; the first one began the first phase

"""What a rehearsal records: allocations with a birth, a death and a meaning. Pure data, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
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
    gpu_only: bool = False  # scratch of a card's kernel; a CPU takes none of it
    owner: str = ""  # the layer from whose weights it was computed, where no module ran
    shares: tuple[tuple[str, int], ...] = ()  # bytes that single layers have in it, where it joins what is theirs
    grown: int = 0  # bytes that come on top for layers which were not rehearsed; see composition.compose.settled

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
    end: int = 1  # the next tick; the first one began the first phase


def settled(recording: Recording) -> Recording:
    """The recording with what its allocations have grown by counted among their bytes; their first dimension grows."""
    if not any(one.grown for one in recording.allocations):
        return recording
    return replace(recording, allocations=[_settled(one) if one.grown else one for one in recording.allocations])


def _settled(one: Allocation) -> Allocation:
    nbytes = one.nbytes + one.grown
    shape = (one.shape[0] * nbytes // one.nbytes, *one.shape[1:]) if one.shape else ()
    return replace(one, nbytes=nbytes, shape=shape, grown=0)

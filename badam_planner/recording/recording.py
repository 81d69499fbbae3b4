"""What a rehearsal records: allocations with a birth, a death and a meaning. Pure data, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Literal, NamedTuple, Protocol

from badam.vocabulary import Category, Phase

NEVER = -1
"""``died`` of an allocation that outlives the recording."""


GIVEN = "given"
"""``operation`` of what existed before the recording began."""


class TensorRole(StrEnum):
    """What an allocation is for, known where it is made; the value is how its label begins."""

    PARAMETER = ""
    BUFFER = "buffer"
    MASTER = "master of"
    GRADIENT = "gradient of"
    STATE = "of"  # an optimizer's; its name comes before
    BATCH = "batch"
    FLASH_SCRATCH = "scratch of flash attention in"
    UNPACKED_WEIGHT = "unpacked weight in"
    FP32_COPY = "fp32 copy in"
    PARTIAL_SUMS = "partial sums in"
    MATMUL_WORKSPACE = "workspace of matrix multiplication"
    GATHER_BUFFER = "gather buffer of"
    GATHERED = "gathered"
    GATHERED_MATRICES = "message of gathered matrices"
    REDUCTION_INPUT = "input of the reduction"
    REDUCED_HALF = "reduced, in the model's type"
    GRADIENT_OF_MICRO_BATCH = "gradient of the batch"
    GRADIENT_SUM = "sum over the batches"
    AVERAGED = "averaged over the copies"
    GRADIENTS_IN_ONE_MESSAGE = "gradients in one message"
    GRADIENT_BUCKET = "bucket of gradients"
    GRADIENTS_OF_PART = "gradients of this card's part"
    MASTERS_OF_PART = "masters of this card's part"
    GRADIENT_TO_HOST = "gradient on its way to the host"
    HOST_MASTERS = "masters in host memory"
    HOST_MOMENTS = "moments in host memory"
    HOST_COLLECTED_GRADIENTS = "gradients as collected in host memory"
    HOST_STEP_GRADIENTS = "gradients of the step in host memory"
    HOST_PARAMETERS = "parts of parameters in host memory"
    GLOO_COPY = "gloo's copy of a message"


CATEGORY_OF_ROLE = {
    TensorRole.PARAMETER: Category.PARAMETER,
    TensorRole.BUFFER: Category.PARAMETER,
    TensorRole.MASTER: Category.MASTER,
    TensorRole.GRADIENT: Category.GRADIENT,
    TensorRole.STATE: Category.OPTIMIZER_STATE,
    TensorRole.BATCH: Category.ACTIVATION,
}
"""Of what a rehearsal names; the category of everything else is given where it is made, or follows from its life."""

_SCRATCH = (TensorRole.FLASH_SCRATCH, TensorRole.UNPACKED_WEIGHT, TensorRole.FP32_COPY, TensorRole.PARTIAL_SUMS)
"""Labels of these say in which module they are taken."""
_OF_WEIGHTS = (*CATEGORY_OF_ROLE, TensorRole.GATHER_BUFFER, TensorRole.GATHERED)
"""Labels of these say which weights they are of."""
_REST = {
    TensorRole.GATHER_BUFFER: "the rest",
    TensorRole.GATHERED: "rest",
    TensorRole.GRADIENT: "the rest",
}
"""How a label ends that is of the parameters outside of every layer."""

NO_LAW = -1
"""``size_law`` of an allocation that is in no family of sizes."""


class ScratchRule(Protocol):
    """How many bytes a kernel takes for so many rows, where that is no polynomial; equal rules are equal objects."""

    def nbytes(self, rows: int) -> int:
        """Bytes for ``rows`` rows."""


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
    role: TensorRole | None = None  # None where nobody said what it is
    parameter: str = ""  # the weight, or the module with the weights, that it is or belongs to
    state: str = ""  # which of the optimizer's states it is, such as "exp_avg"
    gpu_only: bool = False  # scratch of a GPU's kernel; a CPU takes none of it
    owner: str = ""  # the layer from whose weights it was computed, where no module ran
    shares: tuple[tuple[str, int], ...] = ()  # bytes that single layers have in it, where it joins what is theirs
    grown: int = 0  # bytes that come on top for layers which were not rehearsed; see :func:`settled`
    size_law: int = NO_LAW  # by which number of its family its bytes grow with the size; see composition.sizes
    rule: ScratchRule | None = None  # of a kernel's scratch: what its bytes follow from, with ``rows``
    rows: int = 0  # that the rule is applied to
    stream: int = 0  # that runs when it is made; the allocator keeps a pool for each

    @property
    def label(self) -> str | None:
        """A name that a person understands, where there is one."""
        if self.role is None:
            return None
        of = self.module if self.role in _SCRATCH else ""
        if self.role in _OF_WEIGHTS:
            of = self.parameter or _REST.get(self.role, "")
        return " ".join(word for word in (self.state, self.role, of) if word)

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

    @property
    def steps(self) -> list[tuple[int, int]]:
        """The optimizer steps, each from its first tick up to, not including, its end.

        Forward begins the first one, and the phase between two steps each following one. What comes after the last
        update is part of the last step.
        """
        forward = next((tick for tick, phase in self.phase_starts if phase is Phase.FORWARD), None)
        if forward is None:
            return []
        begins = [forward, *(tick for tick, phase in self.phase_starts if phase is Phase.SETUP and tick > forward)]
        if len(begins) > 1:
            begins.pop()  # after the last update
        return list(zip(begins, [*begins[1:], self.end], strict=True))

    @property
    def switches(self) -> bool:
        """Whether a visit ends in the recording."""
        return any(phase is Phase.SWITCH for _, phase in self.phase_starts)


def bytes_of(one: Allocation, number: int) -> int:
    """Bytes of an allocation for which ``number`` was found: itself, or what the rule of a scratch makes of it."""
    return number if one.rule is None else one.rule.nbytes(number)


def settled(recording: Recording) -> Recording:
    """The recording with what its allocations have grown by counted among their bytes; their first dimension grows."""
    if not any(one.grown for one in recording.allocations):
        return recording
    return replace(recording, allocations=[_settled(one) if one.grown else one for one in recording.allocations])


def _settled(one: Allocation) -> Allocation:
    nbytes = one.nbytes + one.grown
    shape = (one.shape[0] * nbytes // one.nbytes, *one.shape[1:]) if one.shape else ()
    return replace(one, nbytes=nbytes, shape=shape, grown=0)

"""What the search over partitions returns: plain data for the renderers. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from badam.errors import DoesNotFit
from badam.plan import Plan
from badam.units import format_batch
from badam.vocabulary import Category, Phase, Task


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to cut and checkpoint the model, with what is predicted of it. Sizes are bytes."""

    strategy: str
    num_blocks: int
    largest_block_parameters: int  # entries trained at a time, at most
    checkpointing: str
    loss: str
    formula_bytes: int  # model states only, by the method's closed form; for badam 2M + 16M/D
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_device_bytes: int
    peak_phase: Phase
    peak_module: str
    peak_block: str
    headroom_bytes: int  # usable less device peak; negative is too big
    backward_relative: float  # predicted backward relative to training everything, mean over blocks
    by_category: dict[Category, int]  # at the peak; sums to peak_allocated_bytes
    by_phase: dict[Phase, int]  # highest allocated bytes within each phase
    fits: bool
    recommended: bool
    largest: tuple[tuple[str, int], ...] = ()  # the largest tensors alive at the peak, by name
    method: str = "badam"
    expandable_segments: bool = False  # whether torch's allocator is to use them


@dataclass(frozen=True, slots=True)
class SearchResult:
    """All candidates for one model on one card, best first."""

    model_id: str
    gpu_name: str
    usable_bytes: int
    batch_size: int
    seq_len: int
    candidates: tuple[Candidate, ...]
    left_out: tuple[tuple[str, str], ...] = ()  # methods that were to be compared and cannot be planned, and why
    task: Task = "causal-lm"
    decoder_len: int | None = None

    @property
    def batch(self) -> str:
        """What is in a micro-batch, in words; of other tasks than a language model's the task too."""
        words = format_batch(self.task, self.batch_size, self.seq_len, self.decoder_len)
        return words if self.task in ("causal-lm", "sequence-classification") else f"{words}, {self.task}"


@dataclass(frozen=True, slots=True)
class SizeCell:
    """One batch size and length. ``checkpointing`` is "" where no setting of the levers fits."""

    batch_size: int
    seq_len: int
    checkpointing: str
    loss: str
    peak_device_bytes: int | None  # with these settings; None where nothing fits

    @property
    def fits(self) -> bool:
        return self.peak_device_bytes is not None


@dataclass(frozen=True, slots=True)
class SizeMap:
    """What fits at which batch size and length, everything else as in one plan: each cell with its fastest levers."""

    usable_bytes: int
    batch_size: int  # of the plan
    seq_len: int
    cells: tuple[SizeCell, ...]  # by batch size, then by length


@dataclass(frozen=True, slots=True)
class Answer:
    """What was tried, and either the plan that is recommended or why there is none."""

    result: SearchResult
    plan: Plan | None
    refusal: DoesNotFit | None
    notes: tuple[str, ...] = ()  # what to know of the model beside the figures, in sentences

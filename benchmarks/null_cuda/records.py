"""What a trace leaves behind: whether the simulated allocator reserved what torch's allocator did. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from badam.plan import Bytes, Provenance, Record, load_record
from badam.profiling.record import Machine


class Trace(Record):
    """One run: a case of benchmarks.gpu on one GPU, with one kind of segments."""

    case: str  # its name
    gpu: str  # id in the catalogue
    expandable_segments: bool

    @property
    def name(self) -> str:
        """A file name that says what it is."""
        return f"{self.case}.{self.gpu}{'.expandable' if self.expandable_segments else ''}"


class TraceRecord(Record):
    """A trace and its result: highest bytes of the optimizer steps, by torch's allocator and by the simulated one."""

    schema_version: Literal[1] = 1
    trace: Trace
    events: int
    allocated_bytes: Bytes
    reserved_bytes: Bytes
    simulated_allocated_bytes: Bytes
    simulated_reserved_bytes: Bytes
    machine: Machine
    provenance: Provenance

    @property
    def is_exact(self) -> bool:
        """Whether both kinds of bytes are the same."""
        simulated = self.simulated_allocated_bytes, self.simulated_reserved_bytes
        return simulated == (self.allocated_bytes, self.reserved_bytes)


def load_trace(path: Path) -> TraceRecord:
    """Read a record; raises PlanError as badam.plan.load_record."""
    return load_record(path, TraceRecord, "record", "Delete it and run benchmarks.card again.")


def _both(gpu: str, cases: Sequence[str]) -> tuple[Trace, ...]:
    return tuple(Trace(case=case, gpu=gpu, expandable_segments=kind) for case in cases for kind in (False, True))


TRACES: Final[tuple[Trace, ...]] = (
    *_both("rtx3090", ["llama-3-2-1b.layer.all.full.1x256", "llama-3-2-1b.layer.none.full.4x1024"]),
    *_both("rtx3090", ["gemma-2-2b.layer.all.full.4x512", "gemma-2-2b.layer.none.chunked.4x512"]),
    *_both("rtx3090", ["llama-2-7b-hf.layer.all.full.8x728", "llama-2-7b-hf.lora.all.full.8x728"]),
    *_both("a100-80gb", ["qwen2-5-0-5b.layer.all.chunked.32x512", "qwen2-5-0-5b.adam.none.full.8x512"]),
    *_both("a100-80gb", ["llama-3-2-3b.layer.all.full.4x2048", "llama-3-2-3b.matrix.none.chunked.4x2048"]),
    *_both("h200", ["qwen2-5-0-5b.badam-ratio.none.full.8x512", "meta-llama-3-8b.lomo.all.full.2x728"]),
    *_both("h200", ["meta-llama-3-8b.layer.list.full.2x728"]),
)
"""Both kinds of segments; ways to cut, methods, sizes; blocks that differ from one another."""

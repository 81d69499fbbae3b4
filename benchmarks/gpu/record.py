"""What a measurement leaves behind: one file per case, whole or not there. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import Field

from badam.errors import BadamError
from badam.plan import Bytes, Plan, Provenance, Record, Seconds, load_record
from badam.profiling.record import Machine, MeasuredRun
from benchmarks.gpu.cases import Case

Outcome = Literal["measured", "out of memory", "failed"]
AGAIN = "Delete it and run benchmarks.gpu.measure again."
ASSUMPTIONS = "assumptions"
"""Name of the file that holds what was found out about the machine itself."""


class DeviceAccount(Record):
    """Where the card's memory is when the last step has ended."""

    allocated_bytes: Bytes
    reserved_bytes: Bytes
    nvml_bytes: Bytes | None
    nvml_source: str  # whether NVML told of this process or of the whole card
    cuda_used_bytes: Bytes  # total less free, as CUDA tells: all processes, without the driver's own share

    @property
    def context_bytes(self) -> int:
        """Outside torch's allocator, if no other process is on the card."""
        return self.cuda_used_bytes - self.reserved_bytes


class CaseRecord(Record):
    """One case: what was predicted before it ran, and what was measured.

    A refused allocation is a result; a failure is not, and is tried again by the next call.
    """

    schema_version: Literal[1] = 1
    case: Case
    outcome: Outcome
    message: str = ""  # what went wrong
    plan: Plan | None = None  # as it ran, with the prediction made before; None if it never came to that
    repredicted: Plan | None = None  # the same plan with a prediction made later, by other code
    run: MeasuredRun | None = None
    account: DeviceAccount | None = None  # on a CUDA device
    peak_before_refusal_bytes: Bytes | None = None  # allocated, on a CUDA device, where it ran out of memory
    seconds: dict[str, Seconds] = Field(default_factory=dict)  # predicting, building, training
    machine: Machine | None = None  # None if the process died
    provenance: Provenance

    @property
    def is_final(self) -> bool:
        """Whether there is nothing to gain from running the case again."""
        return self.outcome != "failed"

    @property
    def latest_plan(self) -> Plan | None:
        """The plan with the newest prediction."""
        return self.repredicted or self.plan


class Scratch(Record):
    """Memory that an operation takes within itself: beyond what was there before and what it returns."""

    operation: str
    shape: str
    kernel: str  # which implementation ran, as its autograd node is called
    scratch_bytes: int
    result_bytes: Bytes
    assumed_bytes: Bytes | None = None  # what the predictor counts; None where it counts nothing


class Assumptions(Record):
    """What the predictor assumes of a card, measured. Bytes; stages and operations in the order in which they ran."""

    schema_version: Literal[1] = 1
    machine: Machine
    provenance: Provenance
    nvml_source: str
    idle_bytes: Bytes | None  # in use before this process had a context, as NVML tells of the whole card
    context_bytes: dict[str, int]  # by stage: total less free less reserved
    nvml_context_bytes: dict[str, int]  # by stage: NVML less reserved
    workspace_bytes: dict[str, int]  # by operation: what stays allocated when its tensors are gone
    scratch: tuple[Scratch, ...]
    segment_bytes: dict[str, int]  # by size of a request: what the allocator reserves for it
    allocator: dict[str, str]  # backend and settings


def record_path(directory: Path, name: str) -> Path:
    """Where the record called ``name`` is kept."""
    return directory / f"{name}.json"


def load_case(path: Path) -> CaseRecord:
    """Read a record.

    Raises:
        PlanError: as badam.plan.load_record.
    """
    return load_record(path, CaseRecord, "record", AGAIN)


def load_assumptions(path: Path) -> Assumptions:
    """Read what was found out about a machine; raises PlanError as badam.plan.load_record."""
    return load_record(path, Assumptions, "record", AGAIN)


def records_under(roots: Iterable[Path]) -> Iterator[tuple[Path, CaseRecord]]:
    """Every case's record under some directories, by path; other files are passed over."""
    for root in roots:
        for path in sorted(root.rglob("*.json")):
            try:
                yield path, load_case(path)
            except BadamError:
                continue


def is_done(path: Path, case: Case) -> bool:
    """Whether ``path`` holds a final and valid record of this very case."""
    try:
        record = load_case(path)
    except BadamError:
        return False
    return record.is_final and record.case == case


def plain_provenance(command: str) -> Provenance:
    """Where a record comes from that a process without torch writes."""
    return Provenance(versions={}, command=command, date=datetime.now(UTC).isoformat(timespec="seconds"))

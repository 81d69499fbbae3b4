"""Where a step's time and memory went, module by module: the record of a run in full mode. Imports no torch."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Self

from pydantic import NonNegativeInt, ValidationError, model_validator

from badam.errors import PlanError
from badam.files import write_file
from badam.plan import Bytes, Record
from badam.vocabulary import Phase

MODULES_FILE = "modules.json.gz"
"""What the record is called, beside measured.json."""

ADVICE = "Make one with badam-train --profile full."


class Span(NamedTuple):
    """One stretch of one step: a module's forward, recomputation or backward, or a whole phase (module "")."""

    module: str
    phase: Phase
    begin_seconds: float
    end_seconds: float
    before_bytes: int
    after_bytes: int
    peak_bytes: int  # the highest allocated bytes from begin to end

    @property
    def seconds(self) -> float:
        """How long it took, with the modules inside."""
        return self.end_seconds - self.begin_seconds


class StepModules(Record):
    """The spans of one optimizer step, in columns.

    A step is cut at its boundaries, where a module or a phase begins or ends. A span goes from one boundary to a later
    one; so memory and time are stored once per boundary, and whatever a span tells of them follows.
    """

    step: NonNegativeInt  # counted from 0
    block: str
    microseconds: tuple[NonNegativeInt, ...]  # per boundary, after the first
    live_bytes: tuple[Bytes, ...]  # per boundary, allocated then
    peak_bytes: tuple[Bytes, ...]  # per boundary, the highest since the boundary before
    module: tuple[NonNegativeInt, ...]  # per span, index of a name
    phase: tuple[NonNegativeInt, ...]  # per span, index of a phase
    begin: tuple[NonNegativeInt, ...]  # per span, index of a boundary
    end: tuple[NonNegativeInt, ...]

    @model_validator(mode="after")
    def _columns_match(self) -> Self:
        if not len(self.microseconds) == len(self.live_bytes) == len(self.peak_bytes):
            raise ValueError("the columns of boundaries differ in length")
        if not len(self.module) == len(self.phase) == len(self.begin) == len(self.end):
            raise ValueError("the columns of spans differ in length")
        last = len(self.microseconds)
        if any(not begin <= end < last for begin, end in zip(self.begin, self.end, strict=True)):
            raise ValueError("a span ends before it begins, or at no boundary")
        return self

    @property
    def highest_bytes(self) -> int:
        """The highest allocated bytes of the step."""
        return max(self.peak_bytes, default=0)


class ModuleTimelines(Record):
    """Of each block that a run in full mode visited, the step with the highest peak, module by module."""

    schema_version: Literal[1] = 1
    plan_digest: str  # badam.plan.record_digest of the plan that ran; "" where there was none
    names: tuple[str, ...]  # of modules; "" stands for the whole phase
    phases: tuple[Phase, ...]
    steps: tuple[StepModules, ...]

    @model_validator(mode="after")
    def _indices_exist(self) -> Self:
        for step in self.steps:
            if max(step.module, default=0) >= len(self.names) or max(step.phase, default=0) >= len(self.phases):
                raise ValueError(f"a span of step {step.step} has a module or phase without a name")
        return self

    @property
    def worst(self) -> StepModules:
        """The step with the highest peak."""
        return max(self.steps, key=lambda step: step.highest_bytes)

    def spans(self, step: StepModules) -> Iterator[Span]:
        """The spans of a step, in order of their beginning, outer ones first."""
        columns = sorted(
            zip(step.begin, step.end, step.module, step.phase, strict=True),
            key=lambda column: (column[0], -column[1], self.names[column[2]] != ""),
        )
        for begin, end, module, phase in columns:
            inside = step.peak_bytes[begin + 1 : end + 1]
            yield Span(
                self.names[module],
                self.phases[phase],
                step.microseconds[begin] / 1e6,
                step.microseconds[end] / 1e6,
                step.live_bytes[begin],
                step.live_bytes[end],
                max(inside, default=step.live_bytes[begin]),
            )


def save_module_timelines(timelines: ModuleTimelines, path: Path) -> None:
    """Write the record as compressed JSON, whole or not at all; the same record gives the same bytes.

    Raises:
        InputError: if the file cannot be written.
    """
    write_file(path, gzip.compress(timelines.model_dump_json().encode(), mtime=0))


def load_module_timelines(path: Path) -> ModuleTimelines:
    """Read and validate what :func:`save_module_timelines` wrote.

    Raises:
        PlanError: if the file cannot be read, or is not such a record.
    """
    try:
        text = gzip.decompress(path.read_bytes())
    except OSError as error:  # gzip's complaint about its content is one too
        raise PlanError(
            f"Cannot read the module timelines {path}: {error.strerror or error}.", advice=ADVICE
        ) from error
    except (EOFError, zlib.error) as error:
        raise PlanError(f"The module timelines {path} are cut off or damaged: {error}.", advice=ADVICE) from error
    try:
        return ModuleTimelines.model_validate_json(text, strict=True)
    except ValidationError as error:
        mistake = error.errors()[0]
        place = ".".join(map(str, mistake["loc"])) or "the record"
        raise PlanError(
            f"The module timelines {path} cannot be used: {place}: {mistake['msg']}.", advice=ADVICE
        ) from error

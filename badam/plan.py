"""The plan: the one contract between planner, trainer and report.

The planner writes it, the trainer runs it, the report shows it; nothing else passes between them. It is frozen,
versioned and plain JSON on disk. This module imports no torch: reading a plan takes milliseconds.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from badam.errors import PlanError
from badam.files import write_file
from badam.vocabulary import (
    Attention,
    Category,
    Checkpointing,
    Dtype,
    Engine,
    Loss,
    Method,
    ModelSource,
    Offload,
    Phase,
    Strategy,
    SwitchMode,
    Task,
    WriteBack,
)

SCHEMA_VERSION: Final = 1

LARGEST = 2**63 - 1
"""What torch's sizes can be at most."""

Count = Annotated[int, Field(gt=0, le=LARGEST)]
Bytes = Annotated[int, Field(ge=0, le=LARGEST)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What every generator of random numbers takes, numpy's included."""

Beta = Annotated[float, Field(ge=0, lt=1)]


class Record(BaseModel):
    """A frozen record that refuses unknown fields, so a typo in a hand-edited file is found, not ignored.

    Infinity and NaN are written by these names, as Python's json reads them: a model's configuration may hold one, and
    so may the loss of a run that diverged.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class ModelSpec(Record):
    """Which model, with everything needed to build its module tree again without network."""

    id: str
    source: ModelSource
    config: dict[str, Any]  # the transformers configuration, as written by to_dict()
    config_digest: str  # sha256 of the configuration, see config_digest()
    task: Task = "causal-lm"
    parameters: Count  # entries of all distinct parameters; tied ones count once


class Rates(Record):
    """How fast a device works, as far as training reaches it."""

    flops_per_second: dict[
        Dtype, Annotated[float, Field(gt=0, allow_inf_nan=False)]
    ]  # of matrix products, by the type of their operands
    bytes_per_second: float = Field(gt=0, allow_inf_nan=False)  # to and from memory, by everything else
    seconds_per_operator: Seconds = 0.0  # to start one, whatever it does
    basis: str  # where these figures come from, in words


class Target(Record):
    """The device the plan is for."""

    gpu: str
    num_gpus: Count = 1
    gpus_per_node: Count = 8
    engine: Engine = "single"
    shard_size: Count | None = None  # under fsdp2, cards that one copy of the model is cut over; None for all
    offload: Offload = "none"  # what is kept in host memory under zero3
    total_bytes: Bytes  # what the driver reports as the card's memory
    usable_bytes: Bytes  # total less the driver's own share: what a process can use, its context included
    context_bytes: Bytes = 0  # taken by the process's device context, outside torch
    communication_bytes: Bytes = 0  # taken by the communication library, outside torch
    workspace_bytes: Bytes = 0  # matrix-multiplication workspace, allocated through torch; each thread takes one
    multiprocessors: Count | None = None  # of the GPU, by which kernels cut their work; None: not known
    threads_per_multiprocessor: Count | None = None  # resident at most
    expandable_segments: bool = False  # torch's allocator grows few segments by pages instead of taking many
    rates: Rates | None = None  # None: nothing is known of its speed

    @property
    def outside_bytes(self) -> int:
        """What a process takes outside torch's allocator: its device context and the communication library."""
        return self.context_bytes + self.communication_bytes

    @property
    def shards(self) -> int:
        """Cards that one copy of the model is cut over; 1 for whole copies."""
        if self.engine == "fsdp2":
            return self.shard_size or self.num_gpus
        return self.num_gpus if self.engine == "zero3" else 1

    @property
    def replicas(self) -> int:
        """Copies of the model, whole or cut; more than one of cut ones is HSDP."""
        return self.num_gpus // self.shards

    @model_validator(mode="after")
    def _shards_divide_the_gpus(self) -> Target:
        if self.shard_size is not None and self.engine != "fsdp2":
            raise ValueError(f"a shard_size needs the engine fsdp2, not {self.engine}")
        if self.shard_size == 1:
            raise ValueError("copies that are not cut are those of the engine ddp")
        if self.num_gpus % self.shards:
            raise ValueError(f"{self.num_gpus} cards cannot be divided into groups of {self.shards}")
        return self


class BlockPlan(Record):
    """One block of the partition and what is predicted while it is active."""

    name: str
    prefixes: tuple[str, ...] = Field(min_length=1)  # module paths; a parameter belongs if its path starts with one
    parameters: Count
    peak_allocated_bytes: Bytes | None = None
    peak_phase: Phase | None = None
    peak_by_phase: dict[Phase, Bytes] = Field(default_factory=dict)
    backward_relative: float | None = Field(
        default=None, ge=0, allow_inf_nan=False
    )  # predicted backward work with this block active / with all active
    seconds_by_phase: dict[Phase, Seconds] = Field(default_factory=dict)  # of one optimizer step with it active
    checkpointed_layers: tuple[str, ...] = ()  # module paths


class Partition(Record):
    """How the parameters are cut into blocks, in model order."""

    strategy: Strategy
    blocks: tuple[BlockPlan, ...] = Field(min_length=1)
    active_modules: tuple[str, ...] = ()  # module paths that are trained in every visit, besides its block


class Schedule(Record):
    """Which block is active when; see badam.blocks.schedule."""

    switch_mode: SwitchMode = "random"
    switch_every: int = Field(
        default=50, ge=-LARGEST, le=LARGEST
    )  # optimizer steps per visit; 0 or less never switches
    seed: Seed = 0


class OptimizerSpec(Record):
    """The base optimizer that runs inside a block."""

    name: Literal["adamw"] = "adamw"
    learning_rate: float = Field(default=1e-5, gt=0, allow_inf_nan=False)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    fused: bool = True
    write_back: WriteBack = "stochastic"
    max_grad_norm: float = Field(default=1.0, ge=0, allow_inf_nan=False)  # 0 switches clipping off


class MethodOptions(Record):
    """What single methods ask for beyond the optimizer; each reads its own, and the others mean nothing to it."""

    update_ratio: float = Field(default=0.1, gt=0, le=1)  # badam-ratio: share of each parameter in its window
    rank: Count | None = None  # lora, qlora, galore; None is the method's default
    alpha: float | None = Field(
        default=None, gt=0, allow_inf_nan=False
    )  # lora, qlora: adapters count alpha / rank; None is 2 rank
    target_modules: tuple[str, ...] = ()  # lora, qlora; none named means every linear layer but the output projection
    projection_gap: Count = 200  # galore: steps between two decompositions of a gradient
    projection_scale: float = Field(default=0.25, gt=0, allow_inf_nan=False)  # galore
    sampled_layers: Count = 2  # lisa: layers trained at a time
    perturbation: float = Field(
        default=1e-3, gt=0, allow_inf_nan=False
    )  # mezo: how far weights are moved for the two forward passes


class Training(Record):
    """What one optimizer step consists of."""

    batch_size: Count
    seq_len: Count  # positions of an input: tokens, or what an image or a recording is cut into
    decoder_len: Count | None = None  # tokens of the target text of an encoder-decoder model
    grad_accum: Count = 1
    dtype: Dtype = "bfloat16"
    checkpointing: Checkpointing = "all"
    loss: Loss = "full"
    attention: Attention = "sdpa"
    optimizer: OptimizerSpec = OptimizerSpec()
    options: MethodOptions = MethodOptions()


class PhaseWork(Record):
    """What one phase of an optimizer step has to do, all micro-batches together."""

    flops: NonNegativeInt  # of matrix products, 2 m n k each
    product_bytes: NonNegativeInt  # that these products read and write
    other_bytes: NonNegativeInt  # that all other operators read and write
    operators: NonNegativeInt


class Prediction(Record):
    """What the rehearsal says the plan needs, for the block where the peak is highest."""

    peak_allocated_bytes: Bytes
    peak_reserved_bytes: Bytes
    peak_device_bytes: Bytes
    # Of a plan that does not fit and runs because torch, at its limit, gives back cached segments and tries again: how
    # often per optimizer step, 0 for in the first ones only. None for a plan that fits.
    cache_releases_per_step: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    formula_bytes: Bytes  # 2M + 16M/D, model states only (arXiv 2404.02827, section 2.2)
    by_category: dict[Category, Bytes]  # at the peak; sums to peak_allocated_bytes
    by_phase: dict[Phase, Bytes]  # highest allocated bytes within each phase
    peak_phase: Phase
    peak_module: str
    peak_block: str
    work_by_phase: dict[Phase, PhaseWork] = Field(default_factory=dict)  # of one optimizer step, mean over blocks
    seconds_by_phase: dict[Phase, Seconds] = Field(default_factory=dict)  # the same in time, where rates are known
    sent_bytes: Bytes | None = None  # by each card in a step, the ring algorithm assumed; None for one card
    sent_bytes_of_full: Bytes | None = None  # the same if every parameter were trained
    sent_between_bytes: Bytes | None = None  # of sent_bytes, to other copies of the model
    sent_between_bytes_of_full: Bytes | None = None  # the same if every parameter were trained
    host_bytes: Bytes | None = None  # that each process keeps in host memory; None if nothing is offloaded
    step_seconds: Seconds | None = None  # one optimizer step with its share of the switch, mean over blocks
    epoch_seconds: Seconds | None = None  # one pass over the samples that the plan was made for


class Provenance(Record):
    """Where a record comes from."""

    versions: dict[str, str]
    command: str
    date: str  # ISO 8601, UTC


class Plan(Record):
    """Everything a training run needs to know, and what is predicted of it."""

    schema_version: Literal[1] = SCHEMA_VERSION
    model: ModelSpec
    target: Target
    method: Method = "badam"
    partition: Partition
    schedule: Schedule = Schedule()
    training: Training
    prediction: Prediction | None = None
    provenance: Provenance


RecordT = TypeVar("RecordT", bound=Record)


def config_digest(config: dict[str, Any]) -> str:
    """sha256 of a model configuration, independent of key order."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def other_versions(plan: Plan) -> str | None:
    """Libraries of which other versions are installed than those that a plan was made with, as part of a sentence.

    None where there are none; other versions may need other memory than was predicted.
    """
    found = []
    for name, recorded in plan.provenance.versions.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if installed != recorded:
            found.append(f"{name} {recorded}, here is {installed}")
    return "; ".join(found) or None


def record_digest(record: Record) -> str:
    """sha256 of a record's canonical JSON; ties a measured run to the plan that it ran.

    Fields that have their default are left out, so that a record keeps its digest when later versions add fields.
    """
    return hashlib.sha256(record.model_dump_json(exclude_defaults=True).encode()).hexdigest()


def load_plan(path: str | Path) -> Plan:
    """Read and validate a plan.

    Raises:
        PlanError: if the file is missing, truncated, not JSON, of another version or has a wrong field; the message
            names the field, what was found and what is expected.
    """
    return load_record(Path(path), Plan, "plan", "Write a new one with badam-plan MODEL --gpu NAME.")


def load_record(path: Path, kind: type[RecordT], word: str, advice: str) -> RecordT:
    """Read and validate a record of class ``kind`` from a JSON file; errors call it a ``word``.

    Values must have the type of their field: a number in quotes is a mistake, not a number.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(f"Cannot read the {word} {path}: {error.strerror or error}.", advice=advice) from error
    except UnicodeDecodeError as error:
        raise PlanError(f"The {word} {path} is not UTF-8 text (byte {error.start}).", advice=advice) from error
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise PlanError(
            f"The {word} {path} is not complete JSON: {error.msg} at line {error.lineno}, column {error.colno}.",
            advice=advice,
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of nested brackets
        raise PlanError(f"The {word} {path} cannot be read as JSON: {error}.", advice=advice) from error
    if not isinstance(content, dict):
        raise PlanError(f"The {word} {path} holds a JSON {type(content).__name__}, not an object.", advice=advice)
    if (found := content.get("schema_version")) != SCHEMA_VERSION:
        raise PlanError(
            f"The {word} {path} has schema_version {found!r}; this version reads {SCHEMA_VERSION}.", advice=advice
        )
    try:
        return kind.model_validate_json(text, strict=True)
    except ValidationError as error:
        field, mistake = mistakes_in(error)
        where = f", field {field}" if field else " as a whole"
        raise PlanError(f"The {word} {path}{where}: {mistake}.", advice=advice) from error


def mistakes_in(error: ValidationError) -> tuple[str, str]:
    """The first wrong field by its path, and what is expected there, what was found, and how many more there are."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    expected = {"extra_forbidden": "there is no field of this name", "missing": "this field is missing"}
    if first["type"] == "value_error":  # fields that do not go together; the sentence is ours and names them
        expected["value_error"] = str(first["ctx"]["error"])
    found = "" if first["type"] in ("missing", "value_error") else f"; found {repr(first['input'])[:80]}"
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return field, f"{expected.get(first['type'], first['msg'])}{found}{more}"


def save_record(record: Record, path: str | Path, *, parents: bool = False) -> None:
    """Write a record as JSON; see :func:`badam.files.write_file`.

    Raises:
        InputError: if the file cannot be written; what was there before is still there.
    """
    write_file(path, record.model_dump_json(indent=2) + "\n", parents=parents)

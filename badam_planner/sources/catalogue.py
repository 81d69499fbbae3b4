"""Models and cards that need neither network nor token: the records of ``badam_profiles``, found by name.

A name matches whatever its case and punctuation: ``RTX 3090``, ``rtx3090`` and ``NVIDIA GeForce RTX 3090`` are one
card. Reading a record takes milliseconds: neither torch nor transformers is loaded, and naming a model by its Hub id
opens one file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from badam.errors import InputError, near_matches
from badam.plan import Bytes, Rates, Record, Target
from badam.units import MIB
from badam.vocabulary import Task

DRIVER_SHARE_MIB = 512
"""What the driver keeps of a card, where torch's own total was never seen. Seen on cards below 40 GiB: 258-513."""
LARGE_DRIVER_SHARE_MIB = 640
"""The same from 40 GiB on. Seen: 450-621."""
LARGE_GPU_MIB = 40 * 1024

PRODUCT_SHARE, BANDWIDTH_SHARE, SECONDS_PER_OPERATOR = 0.6, 0.8, 6e-6
"""What training is assumed to reach of a card's peak rates, and to take for starting an operator.

Assumptions, not measurements: ``badam-report --calibrate`` replaces them by what runs on the card have reached.
"""

THREADS_PER_MULTIPROCESSOR = {
    "7.0": 2048, "7.5": 1024, "8.0": 2048, "8.6": 1536, "8.7": 1536, "8.9": 1536, "9.0": 2048, "10.0": 2048,
    "10.3": 2048, "12.0": 1536, "12.1": 1536,
}  # fmt: skip
"""By compute capability: threads that a multiprocessor keeps resident at most.

Source: the table of technical specifications in the CUDA C++ Programming Guide.
"""

Rate = Annotated[int, Field(gt=0)]


class CatalogueRecord(Record):
    """What every record has: a name, a source and the day when it was last compared with the source."""

    id: str = Field(min_length=1)
    aliases: tuple[str, ...] = ()
    source: str = Field(min_length=1)
    checked: str = Field(pattern=r"^20\d\d-\d\d-\d\d$")

    def names(self) -> tuple[str, ...]:
        """Everything this record answers to."""
        return (self.id, *self.aliases)


class ModelRecord(CatalogueRecord):
    """A model's architecture. ``id`` is its name on the Hugging Face Hub, or in this project."""

    task: Task
    weights: Literal["hub", "none"]  # where pretrained weights are; "none": the model only ever starts at random
    parameters: PositiveInt  # entries of all distinct parameters; tied ones count once
    config: dict[str, Any]  # AutoConfig.for_model(**config) builds the configuration
    confirmed_by: str | None = None  # a library's own copy of the facts, which a test compares with them
    note: str | None = None

    def names(self) -> tuple[str, ...]:
        """Everything this record answers to; the Hub id also without its organisation."""
        return (*super().names(), self.id.rsplit("/", 1)[-1])


class GpuRecord(CatalogueRecord):
    """A card. ``name`` is what the driver calls it. ``profiles/gpus.json`` says what each field means."""

    name: str = Field(min_length=1)
    compute_capability: str = Field(pattern=r"^\d+\.\d$")
    multiprocessors: PositiveInt
    nvml_total_mib: PositiveInt
    nvml_total_measured: bool
    torch_total_mib: PositiveInt | None
    context_bytes: Bytes
    workspace_bytes: Bytes
    bandwidth_bytes_per_second: Rate
    bf16_flops_per_second: Rate
    fp16_flops_per_second: Rate
    fp32_flops_per_second: Rate

    @property
    def threads_per_multiprocessor(self) -> int:
        """Threads that a multiprocessor keeps resident at most."""
        return THREADS_PER_MULTIPROCESSOR[self.compute_capability]

    @property
    def total_bytes(self) -> int:
        """What the driver reports as the card's memory, in bytes."""
        return self.nvml_total_mib * MIB

    @property
    def usable_bytes(self) -> int:
        """What one process can use of the card, its context included, in bytes.

        Source: ``torch_total_mib`` where it was seen; else the total less an allowance for the driver.
        Not counted: other processes and a display.
        """
        if self.torch_total_mib is not None:
            return self.torch_total_mib * MIB
        return self.total_bytes - driver_share_bytes(self.total_bytes)

    def target(self) -> Target:
        """This card as the target of a plan."""
        return Target(
            gpu=self.id,
            total_bytes=self.total_bytes,
            usable_bytes=self.usable_bytes,
            context_bytes=self.context_bytes,
            workspace_bytes=self.workspace_bytes,
            multiprocessors=self.multiprocessors,
            threads_per_multiprocessor=self.threads_per_multiprocessor,
            rates=self.rates(),
        )

    def rates(self) -> Rates:
        """How fast training is assumed to be on this card."""
        return Rates(
            flops_per_second={
                "bfloat16": self.bf16_flops_per_second * PRODUCT_SHARE,
                "float16": self.fp16_flops_per_second * PRODUCT_SHARE,
                "float32": self.fp32_flops_per_second * PRODUCT_SHARE,
            },
            bytes_per_second=self.bandwidth_bytes_per_second * BANDWIDTH_SHARE,
            seconds_per_operator=SECONDS_PER_OPERATOR,
            basis=f"assuming {PRODUCT_SHARE:.0%} of the card's matrix rate, {BANDWIDTH_SHARE:.0%} of its bandwidth and "
            f"{SECONDS_PER_OPERATOR * 1e6:.0f} µs per operator",
        )

    def names(self) -> tuple[str, ...]:
        """Everything this record answers to, the driver's name included."""
        return (*super().names(), self.name)


def driver_share_bytes(total_bytes: int) -> int:
    """What the driver is assumed to keep of a card of ``total_bytes``."""
    return (LARGE_DRIVER_SHARE_MIB if total_bytes >= LARGE_GPU_MIB * MIB else DRIVER_SHARE_MIB) * MIB


def fold(name: str) -> str:
    """``name`` without case and punctuation, as names are compared."""
    return "".join(character for character in name.lower() if character.isalnum())


def fold_gpu(name: str) -> str:
    """A card's ``name`` as names are compared: also without maker and brand, which people leave out."""
    folded = fold(name)
    for word in ("nvidia", "geforce", "tesla"):
        folded = folded.removeprefix(word) or folded
    return folded


def find_model(name: str) -> ModelRecord:
    """The model called ``name``, by Hub id or alias.

    Raises:
        InputError: if the catalogue has no such model; the advice lists near matches.
    """
    wanted = fold(name)
    for file in _model_files():
        if fold(file.name.removesuffix(".json")) == wanted:
            return _read_model(file)
    for record in models():
        if wanted in map(fold, record.names()):
            return record
    raise _unknown("model", name, (alias for record in models() for alias in record.names()))


def find_gpu(name: str) -> GpuRecord:
    """The card called ``name``, by id, alias or the driver's name for it.

    Raises:
        InputError: if the catalogue has no such card; the advice lists near matches.
    """
    record = match_gpu(name)
    if record is None:
        raise _unknown("GPU", name, (record.id for record in gpus()))
    return record


def match_gpu(name: str) -> GpuRecord | None:
    """The card called ``name``, or None if the catalogue has no such card."""
    wanted = fold_gpu(name)
    for record in gpus():
        if wanted in map(fold_gpu, record.names()):
            return record
    return None


def models() -> tuple[ModelRecord, ...]:
    """All models, by id."""
    return tuple(_read_model(file) for file in _model_files())


@cache
def gpus() -> tuple[GpuRecord, ...]:
    """All cards, older architectures first."""
    content = json.loads((files("badam_profiles") / "gpus.json").read_text(encoding="utf-8"))
    return tuple(GpuRecord.model_validate(entry) for entry in content["gpus"])


def _model_files() -> Iterator[Traversable]:
    folder = files("badam_profiles") / "models"
    return (file for file in sorted(folder.iterdir(), key=lambda file: file.name) if file.name.endswith(".json"))


def _read_model(file: Traversable) -> ModelRecord:
    return ModelRecord.model_validate_json(file.read_text(encoding="utf-8"))


def _unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    close = near_matches(name, known)
    advice = f"Did you mean {', '.join(close)}?" if close else f"docs/catalogue.md says how to add a {kind}."
    return InputError(f"The catalogue has no {kind} called {name!r}.", advice=advice)

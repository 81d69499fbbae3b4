"""What is kept of each case: the figures of its report, small enough for hundreds of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field

from badam.files import write_file
from badam.plan import Bytes, Record
from badam.vocabulary import Category, Phase

FOLDER = Path(__file__).parents[1] / "records" / "cpu"


class Sides(Record):
    """Predicted and measured bytes."""

    predicted: Bytes | None
    measured: Bytes | None

    @property
    def error_bytes(self) -> int | None:
        """Predicted less measured."""
        return None if self.predicted is None or self.measured is None else self.predicted - self.measured

    @property
    def error(self) -> float | None:
        """The error as a share of the measured bytes."""
        return None if self.error_bytes is None or not self.measured else self.error_bytes / self.measured


class Outcome(Record):
    """One case as its report shows it, or why there is none."""

    name: str
    architecture: str
    method: str
    checkpointing: str
    loss: str
    partition: str
    batch_size: int
    seq_len: int
    steps: int
    refusal: str = ""
    allocated: Sides | None = None
    worst_name: str = ""  # the judged peak that is most off, and by how much
    worst_error: float = 0.0
    parts: dict[Category, Sides] = Field(default_factory=dict)
    phases: dict[Phase, Sides] = Field(default_factory=dict)
    seconds: float = 0.0  # of plan, run and report together
    machine: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    command: str = ""
    date: str = ""

    @property
    def peak_error(self) -> float:
        """Absolute error of the allocated peak, as a share."""
        return abs(self.allocated.error or 0.0) if self.allocated else 0.0


def load_outcomes(folder: Path = FOLDER) -> dict[str, Outcome]:
    """All kept outcomes by the names of their cases."""
    found: dict[str, Outcome] = {}
    for path in sorted(folder.glob("*.json")):
        for content in json.loads(path.read_text(encoding="utf-8")):
            outcome = Outcome.model_validate_json(json.dumps(content))
            found[outcome.name] = outcome
    return found


def save_outcomes(outcomes: Iterable[Outcome], folder: Path = FOLDER) -> None:
    """Write one file per architecture, each whole or not at all."""
    by_architecture: dict[str, list[Any]] = {}
    for outcome in sorted(outcomes, key=lambda one: one.name):
        content = outcome.model_dump(mode="json", exclude_defaults=True)
        by_architecture.setdefault(outcome.architecture, []).append(content)
    for architecture, contents in by_architecture.items():
        lines = ",\n".join(json.dumps(content, separators=(",", ":")) for content in contents)
        write_file(folder / f"{architecture}.json", f"[\n{lines}\n]\n", parents=True)

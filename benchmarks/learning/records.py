"""What the contest leaves behind: one small file per contestant, written again after each of its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import PositiveInt

from badam.plan import Bytes, Provenance, Record, Seconds, load_record, save_record
from badam.profiling.record import Machine

AGAIN = "Delete it and run benchmarks.convergence again."
CONTEST = "contest.json"
LONGER = "longer"  # directory of the runs with more steps
EPOCHS = "epochs"  # directory of the runs for three epochs
UPDATES = "updates"  # directory of Adam's runs with as many updates as BAdam gives each block in those


class Point(Record):
    """The loss on held-out data after a number of optimizer steps, and the processor seconds that they took."""

    step: int
    seconds: Seconds
    loss: float
    training_loss: float | None = None  # over as many pairs of those that are trained on


class RunRecord(Record):
    """One run."""

    rate: float
    seed: int
    peak_bytes: Bytes  # allocated, weights included
    points: tuple[Point, ...]

    @property
    def final_loss(self) -> float:
        """Held-out loss at the end."""
        return self.points[-1].loss

    @property
    def best_loss(self) -> float:
        """Lowest held-out loss at any evaluation, as a run with early stopping would end with."""
        return min(point.loss for point in self.points)


class ContestantRecord(Record):
    """All runs of one contestant."""

    schema_version: Literal[1] = 1
    settings_digest: str
    name: str
    runs: tuple[RunRecord, ...] = ()

    def find(self, rate: float, seed: int) -> RunRecord | None:
        """The run with this rate and seed, if it was made."""
        return next((run for run in self.runs if run.rate == rate and run.seed == seed), None)


class ContestRecord(Record):
    """What all runs share."""

    schema_version: Literal[1] = 1
    settings_digest: str
    parameters: PositiveInt
    source_tokens: PositiveInt
    training_pairs: PositiveInt
    evaluation_tokens: PositiveInt
    machine: Machine
    provenance: Provenance


def load_contestant(directory: Path, name: str, digest: str) -> ContestantRecord:
    """The runs that a contestant has behind it under these settings; those of other settings do not count."""
    path = directory / file_name(name)
    empty = ContestantRecord(settings_digest=digest, name=name)
    if not path.exists():
        return empty
    found = load_record(path, ContestantRecord, "record of runs", AGAIN)
    return found if found.settings_digest == digest else empty


def add_run(directory: Path, record: ContestantRecord, run: RunRecord) -> ContestantRecord:
    """Append a run, on disk too."""
    longer = record.model_copy(update={"runs": (*record.runs, run)})
    directory.mkdir(parents=True, exist_ok=True)
    save_record(longer, directory / file_name(record.name))
    return longer


def file_name(name: str) -> str:
    """The file of a contestant."""
    return name.replace(", ", "-").replace(" ", "-") + ".json"

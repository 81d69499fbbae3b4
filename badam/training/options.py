"""What a run needs beyond the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from badam.training import demo_data
from badam.training.batches import OnLong, Padding
from badam.training.weights import PRETRAINED


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What a run needs beyond the plan."""

    output_dir: Path
    data: str = demo_data.NAME  # file, directory, Hub id, or the name of the data every machine has
    columns: Mapping[str, str] = field(default_factory=dict)  # names the formats know -> the data's names
    split: str = "train"
    init: str = PRETRAINED  # or "random", or a directory
    max_steps: int | None = None  # instead of epochs
    epochs: float = 1.0
    resume: bool = False
    save_steps: int | None = None  # None saves at the end and on request only
    keep: int | None = None
    lr_scheduler: str = "cosine"
    warmup_steps: int = 0
    padding: Padding = "auto"
    on_long: OnLong = "truncate"
    seed: int = 0
    report_to: tuple[str, ...] = ()

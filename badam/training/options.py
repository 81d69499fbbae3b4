"""What a run needs beyond the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from badam.errors import InputError
from badam.training.data import demo as demo_data
from badam.training.weights import PRETRAINED
from badam.vocabulary import LossOn, OnBadRow, OnLong, Padding, Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What a run needs beyond the plan."""

    output_dir: Path
    data: str = demo_data.NAME  # file, directory, Hub id, or the name of the data every machine has
    columns: Mapping[str, str] = field(default_factory=dict)  # names the formats know -> the data's names
    split: str = "train"
    records: str | None = None  # key of the list of records in a JSON file that is an object
    on_bad_row: OnBadRow = "refuse"
    loss_on: LossOn | None = None  # None is the completion, or what the assistant says
    init: str = PRETRAINED  # or "random", or a directory
    max_steps: int | None = None  # instead of epochs
    epochs: float = 1.0
    resume: bool = False
    save_steps: int | None = None  # None saves at the end and on request only
    keep: int | None = None
    lr_scheduler: str = "cosine"
    warmup_steps: int = 0
    warmup_share: float = 0.0  # of all steps, in place of a number of steps
    eval_data: str | None = None  # as data
    eval_split: str = "validation"  # of a Hub data set
    eval_share: float = 0.0  # of the data, held out where there is no eval_data
    eval_steps: int | None = None  # None evaluates with every checkpoint, or after every epoch
    keep_best: bool = False  # end with the weights of the best evaluation
    patience: int | None = None  # evaluations without a better one after which to stop
    pack: bool = False
    adapt: bool = False
    padding: Padding = "auto"
    on_long: OnLong = "truncate"
    seed: int = 0
    profile: Profile = "normal"
    report_to: tuple[str, ...] = ()
    scratch: str = field(default_factory=lambda: uuid4().hex)  # process numbers of two machines may be the same

    @property
    def data_directory(self) -> Path:
        """Where this process keeps large data during the run; one that was killed leaves it to the next to remove."""
        return self.output_dir / f".data-{self.scratch}.partial"

    @property
    def evaluates(self) -> bool:
        """Whether there is evaluation data."""
        return self.eval_data is not None or self.eval_share > 0

    @property
    def evaluation_steps(self) -> int | None:
        """Steps between two evaluations; None is once per epoch."""
        return self.eval_steps or self.save_steps

    @property
    def checkpoint_steps(self) -> int | None:
        """Steps between two checkpoints; None is none, or once per epoch where the best one is kept."""
        return self.save_steps or (self.eval_steps if self.keep_best else None)

    def check(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            InputError: with the options and what to change.
        """
        if self.eval_data is not None and self.eval_share:
            raise InputError("There are two kinds of evaluation data.", advice="Give --eval-data or --eval-share.")
        if not 0 <= self.eval_share < 1:
            raise InputError(
                f"--eval-share {self.eval_share:g} is not a share of the data.", advice="Give one such as 0.05."
            )
        if not 0 <= self.warmup_share <= 1:
            raise InputError(
                f"--warmup-share {self.warmup_share:g} is not a share of the steps.", advice="Give one such as 0.03."
            )
        if self.warmup_share and self.warmup_steps:
            raise InputError("The warm-up is given twice.", advice="Give --warmup-steps or --warmup-share.")
        wishes = {"--eval-steps": self.eval_steps, "--best": self.keep_best, "--patience": self.patience}
        for option, value in wishes.items():
            if value and not self.evaluates:
                raise InputError(
                    f"{option} needs evaluation data.", advice="Add --eval-data FILE or --eval-share 0.05."
                )
        if self.patience and not self.keep_best:
            raise InputError("--patience stops when the best is past, so it needs --best.", advice="Add --best.")
        if self.keep_best and self.save_steps and self.eval_steps and self.save_steps % self.eval_steps:
            raise InputError(
                f"With --best a checkpoint follows an evaluation, but --save-steps {self.save_steps} is not a multiple "
                f"of --eval-steps {self.eval_steps}.",
                advice=f"Save every {self.eval_steps} steps, for instance.",
            )

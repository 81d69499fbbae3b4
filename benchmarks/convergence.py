"""Does it learn? One small model, fine-tuned by every method with the same tokens.

    python -m benchmarks.convergence            # run what has not been run yet, then write docs/convergence.md
    python -m benchmarks.convergence --page     # only write the page again

The model (benchmarks/learning/contest.py) is first trained by Adam on one half of Python's standard library and then
fine-tuned to write docstrings of the other half (benchmarks/learning/corpus.py). Learning rates are chosen by one rule
for all (benchmarks/learning/rates.py). Some methods then run four times as long, and for three epochs; two more runs
look for the reason of what comes out (benchmarks/learning/contest.py). Each run is kept in
benchmarks/records/convergence as soon as it is over, so a stopped benchmark goes on where it was; those weights
are kept in the user's cache.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from badam.files import cache_directory
from badam.plan import save_record
from benchmarks.learning.contest import (
    ADAM_OF_FEW_UPDATES,
    CONTESTANTS,
    EPOCHS_CONTESTANTS,
    EPOCHS_FIRST_RATES,
    EPOCHS_RATES,
    FEW_UPDATES_RATES,
    LONGER_CONTESTANTS,
    VOCABULARY,
    Contestant,
    Settings,
    epochs_settings,
    few_updates_settings,
    longer_settings,
    plan_of,
)
from benchmarks.learning.rates import best_position, next_position, rate_at
from benchmarks.learning.records import (
    CONTEST,
    EPOCHS,
    LONGER,
    UPDATES,
    ContestantRecord,
    ContestRecord,
    RunRecord,
    add_run,
    load_contestant,
)

if TYPE_CHECKING:
    from benchmarks.learning.corpus import Corpus

RECORDS = Path(__file__).parent / "records" / "convergence"
PAGE = Path(__file__).parents[1] / "docs/convergence.md"

Run = Callable[[float, int], RunRecord]
Search = Callable[[Mapping[int, float]], int | None]


def main() -> None:
    """Run the contest, then write its page."""
    settings = Settings()
    if "--page" not in sys.argv[1:]:
        run_all(settings, RECORDS)
    from benchmarks.learning.page import write_page

    write_page(settings, RECORDS, PAGE)


class Stage:
    """What all runs need: the corpus, read once, and for each group of settings the weights that runs begin with."""

    def __init__(self) -> None:
        import torch
        from transformers.utils.logging import disable_progress_bar

        from benchmarks.learning.corpus import load_corpus

        torch.set_num_threads(1)
        disable_progress_bar()
        self.corpus: Corpus = load_corpus(vocabulary=VOCABULARY, length=Settings().seq_len)

    def runner(self, contestant: Contestant, settings: Settings) -> Run:
        """What makes one run of a contestant under these settings."""
        from benchmarks.learning.runs import fine_tune

        return lambda rate, seed: fine_tune(contestant, settings, self.corpus, self.weights(settings), rate, seed)

    def weights(self, settings: Settings) -> Path:
        """The directory of the weights that fine-tuning begins with; made when they are first needed."""
        from benchmarks.learning.runs import pretrain

        directory = cache_directory() / f"convergence-{settings.base_digest}"
        if not (directory / "model.safetensors").exists():
            pretrain(settings, self.corpus, directory)
        return directory


def run_all(settings: Settings, directory: Path) -> None:
    """Every run that is not in ``directory`` yet: the contest, then the runs that are longer."""
    stage = Stage()
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / CONTEST).exists():
        save_record(_contest(settings, stage.corpus), directory / CONTEST)
    best = run_contest(stage, settings, directory)
    longer = longer_settings()
    for contestant in LONGER_CONTESTANTS:
        record = load_contestant(directory / LONGER, contestant.name, longer.digest)
        if not record.runs:
            run = stage.runner(contestant, longer)(best[contestant.name], longer.seeds[0])
            add_run(directory / LONGER, record, run)
            print(f"{contestant.name:16} {longer.steps} steps  loss {run.final_loss:.3f}", flush=True)
    run_epochs(stage, epochs_settings(), directory / EPOCHS)
    run_given(stage, few_updates_settings(), [(ADAM_OF_FEW_UPDATES, FEW_UPDATES_RATES)], directory / UPDATES)


def run_contest(stage: Stage, settings: Settings, directory: Path) -> dict[str, float]:
    """The contest: first all rates, then all other seeds. Returns the best rate of each contestant."""
    best: dict[str, float] = {}
    for complete in (False, True):
        for contestant in CONTESTANTS:
            record = load_contestant(directory, contestant.name, settings.digest)
            seeds = settings.seeds if complete else settings.seeds[:1]
            record = compete(contestant, record, stage.runner(contestant, settings), directory, seeds)
            best[contestant.name] = record.runs[-1].rate
    return best


def run_epochs(stage: Stage, settings: Settings, directory: Path) -> None:
    """Three epochs, for every contestant at one rate, then at a second, then at a third."""
    for most in range(1, EPOCHS_RATES + 1):
        for contestant in EPOCHS_CONTESTANTS:
            search = partial(next_position, first=EPOCHS_FIRST_RATES[:most], most=most)
            record = load_contestant(directory, contestant.name, settings.digest)
            compete(contestant, record, stage.runner(contestant, settings), directory, settings.seeds, search)


def run_given(
    stage: Stage, settings: Settings, runs: Iterable[tuple[Contestant, Iterable[float]]], directory: Path
) -> None:
    """Each contestant at each of its rates, with the first seed."""
    for contestant, rates in runs:
        record = load_contestant(directory, contestant.name, settings.digest)
        for rate in rates:
            if record.find(rate, settings.seeds[0]) is None:
                run = stage.runner(contestant, settings)(rate, settings.seeds[0])
                record = add_run(directory, record, run)
                print(f"{contestant.name:16} {settings.steps} steps  loss {run.best_loss:.3f}", flush=True)


def compete(
    contestant: Contestant,
    record: ContestantRecord,
    run: Run,
    directory: Path,
    seeds: tuple[int, ...],
    search: Search = next_position,
) -> ContestantRecord:
    """Choose the contestant's rate with the first seed, and run the others with it.

    ``search`` says which position to try next; rates are judged by the lowest loss that a run had at any evaluation.
    """

    def result(rate: float, seed: int) -> RunRecord:
        nonlocal record
        found = record.find(rate, seed)
        if found is None:
            found = run(rate, seed)
            record = add_run(directory, record, found)
            print(
                f"{contestant.name:16} rate {rate:.1e}  seed {seed}  loss {found.final_loss:.3f}  "
                f"{found.points[-1].seconds:.0f} s  {found.peak_bytes / 2**20:.1f} MiB",
                flush=True,
            )
        return found

    losses: dict[int, float] = {}
    while (position := search(losses)) is not None:
        losses[position] = result(rate_at(contestant.rate, position), seeds[0]).best_loss
    for seed in seeds[1:]:
        result(rate_at(contestant.rate, best_position(losses)), seed)
    return record


def _contest(settings: Settings, corpus: Corpus) -> ContestRecord:
    import torch

    from badam.profiling.machine import provenance, this_machine
    from badam.training.losses import IGNORE_INDEX

    held_out = corpus.evaluation[: settings.evaluation_batches * settings.batch_size]
    return ContestRecord(
        settings_digest=settings.digest,
        parameters=plan_of(CONTESTANTS[0], settings, 1.0, 0).model.parameters,
        source_tokens=len(corpus.sources),
        training_pairs=len(corpus.training),
        evaluation_tokens=sum(label != IGNORE_INDEX for example in held_out for label in example["labels"]),
        machine=this_machine(torch.device("cpu")),
        provenance=provenance("python -m benchmarks.convergence"),
    )


if __name__ == "__main__":
    main()

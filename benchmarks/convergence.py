"""Does it learn? One small model, fine-tuned by every method with the same tokens.

    python -m benchmarks.convergence            # run what has not been run yet, then write docs/convergence.md
    python -m benchmarks.convergence --page     # only write the page again

The model (benchmarks/learning/contest.py) is first trained by Adam on one half of Python's standard library and then
fine-tuned to write docstrings of the other half (benchmarks/learning/corpus.py). Learning rates are chosen by one rule
for all (benchmarks/learning/rates.py). Some methods then run four times as long. Each run is kept in
profiles/measured/convergence as soon as it is over, so a stopped benchmark goes on where it was; those weights
are kept in the user's cache.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from badam.plan import save_record
from badam.training.demo_data import user_cache
from benchmarks.learning.contest import (
    CONTESTANTS,
    LONGER_CONTESTANTS,
    VOCABULARY,
    Contestant,
    Settings,
    longer_settings,
    plan_of,
)
from benchmarks.learning.rates import best_position, next_position, rate_at
from benchmarks.learning.records import (
    CONTEST,
    LONGER,
    ContestantRecord,
    ContestRecord,
    RunRecord,
    add_run,
    load_contestant,
)

if TYPE_CHECKING:
    from benchmarks.learning.corpus import Corpus

RECORDS = Path(__file__).parents[1] / "profiles/measured/convergence"
PAGE = Path(__file__).parents[1] / "docs/convergence.md"

Run = Callable[[float, int], RunRecord]


def main() -> None:
    """Run the contest, then write its page."""
    settings = Settings()
    if "--page" not in sys.argv[1:]:
        run_all(settings, RECORDS)
    from benchmarks.learning.page import write_page

    write_page(settings, RECORDS, PAGE)


def run_all(settings: Settings, directory: Path) -> None:
    """Every run of every contestant that is not in ``directory`` yet: first all rates, then all other seeds."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from benchmarks.learning.corpus import load_corpus
    from benchmarks.learning.runs import fine_tune

    torch.set_num_threads(1)
    disable_progress_bar()
    corpus = load_corpus(vocabulary=VOCABULARY, length=settings.seq_len)
    weights = _pretrained(settings, corpus)
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / CONTEST).exists():
        save_record(_contest(settings, corpus), directory / CONTEST)

    def runner(contestant: Contestant, chosen: Settings) -> Run:
        return lambda rate, seed: fine_tune(contestant, chosen, corpus, weights, rate, seed)

    best: dict[str, float] = {}
    for complete in (False, True):
        for contestant in CONTESTANTS:
            record = load_contestant(directory, contestant.name, settings.digest)
            seeds = settings.seeds if complete else settings.seeds[:1]
            record = compete(contestant, record, runner(contestant, settings), directory, seeds)
            best[contestant.name] = record.runs[-1].rate
    longer = longer_settings()
    for contestant in LONGER_CONTESTANTS:
        record = load_contestant(directory / LONGER, contestant.name, longer.digest)
        if not record.runs:
            run = runner(contestant, longer)(best[contestant.name], longer.seeds[0])
            add_run(directory / LONGER, record, run)
            print(f"{contestant.name:16} {longer.steps} steps  loss {run.final_loss:.3f}", flush=True)


def compete(
    contestant: Contestant, record: ContestantRecord, run: Run, directory: Path, seeds: tuple[int, ...]
) -> ContestantRecord:
    """Choose the contestant's rate with the first seed, and run the others with it."""

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
    while (position := next_position(losses)) is not None:
        losses[position] = result(rate_at(contestant.rate, position), seeds[0]).final_loss
    for seed in seeds[1:]:
        result(rate_at(contestant.rate, best_position(losses)), seed)
    return record


def _pretrained(settings: Settings, corpus: Corpus) -> Path:
    from benchmarks.learning.runs import pretrain

    directory = user_cache() / f"convergence-{settings.digest}"
    if not (directory / "model.safetensors").exists():
        pretrain(settings, corpus, directory)
    return directory


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

"""Random configurations close to a pretended limit, and what became of them. Loads no torch."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt

from badam.errors import BadamError
from badam.plan import Bytes, Provenance, Record, Seconds, load_record
from badam.profiling.record import Machine
from badam.units import format_bytes
from benchmarks.gpu.cases import Case

MODELS = (
    ("Qwen/Qwen2.5-0.5B", 494_032_768),
    ("meta-llama/Llama-3.2-1B", 1_235_814_400),
    ("google/gemma-2-2b", 2_614_341_888),
    ("meta-llama/Llama-3.2-3B", 3_212_749_824),
    ("microsoft/Phi-3-mini-4k-instruct", 3_821_079_552),
    ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
    ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
)
"""Name and parameters; the larger, the fewer tokens a step has, so that a draw takes seconds."""

TOKENS_TIMES_PARAMETERS = 3 * 10**13
CLOSE = 0.05
"""How far the pretended limit lies from what was predicted at most, as a share of it."""


class Draw(Record):
    """One random configuration. ``fraction`` is the pretended limit over the predicted peak."""

    index: NonNegativeInt
    case: Case
    fraction: float


class Outcome(Record):
    """What became of one draw. Bytes are of torch's allocator: a context cannot be limited, so it takes no part."""

    draw: Draw
    blocks: tuple[str, ...]  # the ones that were run: the one with the highest predicted peak first
    predicted_allocated_bytes: Bytes
    predicted_bytes: Bytes  # reserved, or allocated where nothing is reserved (CPU)
    limit_bytes: Bytes
    ran: bool | None  # None: something else went wrong
    predicted_releases_per_step: float | None = None  # of cached segments to stay within the limit; None: runs out
    measured_allocated_bytes: Bytes | None = None
    measured_bytes: Bytes | None = None  # reserved at the peak, or allocated (CPU); None if it did not run
    message: str = ""
    seconds: Seconds = 0.0

    @property
    def fits(self) -> bool:
        """The planner's answer."""
        return self.predicted_bytes <= self.limit_bytes

    @property
    def verdict(self) -> Literal["right", "wrong fit", "false refusal", "only by giving back cache", "undecided"]:
        """The answer beside what happened. That it runs only by giving back cache is an answer of its own."""
        if self.ran is None:
            return "undecided"
        if self.fits == self.ran:
            return "right"
        if self.fits:
            return "wrong fit"
        return "false refusal" if self.predicted_releases_per_step is None else "only by giving back cache"

    @property
    def headroom_bytes(self) -> int:
        """Limit less predicted."""
        return self.limit_bytes - self.predicted_bytes


class BudgetRecord(Record):
    """The outcomes of some draws of one model, run one after the other in one process."""

    schema_version: Literal[1] = 1
    outcomes: tuple[Outcome, ...]
    message: str = ""  # what ended the process before its last draw
    machine: Machine
    provenance: Provenance


def draw(index: int, *, seed: int, models: Sequence[tuple[str, int]] = MODELS, group: int = 10) -> Draw:
    """Random configuration number ``index``; a pure function of its arguments. ``group`` in a row share a model."""
    chance = random.Random(f"{seed}:{index}")
    model, parameters = models[index // group % len(models)]
    tokens = max(64, TOKENS_TIMES_PARAMETERS // parameters)
    length = min(2 ** chance.randint(5, 13), tokens) - chance.randint(0, 31)
    batch = chance.randint(1, max(1, min(64, tokens // length)))
    case = Case(
        model=model,
        cut=chance.choice(("layer", "attn-mlp", "matrix")),
        checkpointing=chance.choice(("all", "none")),
        loss=chance.choice(("full", "chunked")),
        batch_size=batch,
        seq_len=length,
    )
    return Draw(index=index, case=case, fraction=round(1 + chance.uniform(-CLOSE, CLOSE), 6))


def load_budget(path: Path) -> BudgetRecord:
    """Read the outcomes of a group of draws; raises PlanError as badam.plan.load_record."""
    return load_record(path, BudgetRecord, "record", "Delete it and run benchmarks.gpu.budget again.")


def outcomes_in(paths: Iterable[Path]) -> tuple[Outcome, ...]:
    """All outcomes in the records that can be read, by index."""
    found: dict[int, Outcome] = {}
    for path in paths:
        try:
            found.update((outcome.draw.index, outcome) for outcome in load_budget(path).outcomes)
        except BadamError:
            continue
    return tuple(found[index] for index in sorted(found))


def counts(outcomes: Sequence[Outcome]) -> str:
    """How many answers were wrong, in either way."""
    counted = Counter(outcome.verdict for outcome in outcomes)
    text = f"{counted['wrong fit']} wrong fits, {counted['false refusal']} false refusals"
    if squeezed := counted["only by giving back cache"]:
        text += f", {squeezed} as foreseen only by giving back cache"
    return f"{text}, {counted['undecided']} failed" if counted["undecided"] else text


def summary(outcomes: Sequence[Outcome], asked_for: int) -> str:
    """One line with the counts, and the headroom that would have made every wrong fit a refusal."""
    text = f"{len(outcomes)} of {asked_for} draws: {counts(outcomes)}"
    wrong = [outcome.headroom_bytes for outcome in outcomes if outcome.verdict == "wrong fit"]
    return f"{text}; a margin of {format_bytes(max(wrong) + 1)} would have prevented them" if wrong else text

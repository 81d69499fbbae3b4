"""What is measured: one record per configuration, the most telling ones first."""

from __future__ import annotations

import fnmatch
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, PositiveInt, TypeAdapter, ValidationError

from badam.errors import InputError
from badam.plan import Record
from badam.vocabulary import BlockStrategy, Checkpointing, Loss

MeasuredMethod = Literal["badam", "badam-ratio", "adam", "lora", "lomo"]
Side = Literal["own", "badam-1.4"]


class Case(Record):
    """One configuration to measure.

    ``cut`` says what a block is where the method has blocks. Checkpointing ``list`` is every second layer. ``blocks``
    says which blocks are visited: ``all``, or of each kind of block the lowest, the middle and the highest one, which
    are the extremes of memory and time.
    """

    model: str  # catalogue name, or path of a config.json
    method: MeasuredMethod = "badam"
    cut: BlockStrategy = "layer"
    checkpointing: Checkpointing = "all"
    loss: Loss = "full"
    batch_size: PositiveInt
    seq_len: PositiveInt
    grad_accum: PositiveInt = 1
    side: Side = "own"  # whose optimizer runs
    blocks: Literal["ends", "all"] = "ends"
    update_ratio: Annotated[float, Field(gt=0, le=1)] = 0.05  # of badam-ratio
    switch_every: PositiveInt = 2
    block_epochs: PositiveInt = 2

    @property
    def name(self) -> str:
        """A file name that says what the case is, such as ``llama-2-7b-hf.layer.all.full.8x728``."""
        stem = Path(self.model).stem if self.model.endswith(".json") else self.model.rpartition("/")[2]
        parts = [re.sub(r"[^a-z0-9]+", "-", stem.lower()), self.way, self.checkpointing, self.loss]
        parts.append(f"{self.batch_size}x{self.seq_len}")
        parts += [f"accum-{self.grad_accum}"] if self.grad_accum > 1 else []
        parts += ["every-block"] if self.blocks == "all" else []
        parts += [] if self.side == "own" else [self.side]
        return ".".join(parts)

    @property
    def way(self) -> str:
        """The cut of a method that has blocks, or the method."""
        return self.cut if self.method == "badam" else self.method

    def steps(self, blocks: int) -> int:
        """Optimizer steps of the run: every one of ``blocks`` blocks is visited ``block_epochs`` times.

        A share of every matrix has no blocks to go through: it moves on as often as three blocks would.
        """
        visits = 3 if self.method == "badam-ratio" else blocks
        return visits * self.switch_every * self.block_epochs


LLAMA_1B, LLAMA_3B = "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B"
LLAMA_7B, LLAMA_8B, LLAMA_13B = "meta-llama/Llama-2-7b-hf", "meta-llama/Meta-Llama-3-8B", "meta-llama/Llama-2-13b-hf"
QWEN_HALF_B, QWEN_7B, QWEN3_8B = "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B", "Qwen/Qwen3-8B"
GEMMA_2B, GEMMA_9B = "google/gemma-2-2b", "google/gemma-2-9b"
PHI, MISTRAL = "microsoft/Phi-3-mini-4k-instruct", "mistralai/Mistral-7B-v0.1"


def _case(model: str, size: tuple[int, int], **settings: Any) -> Case:
    return Case(model=model, batch_size=size[0], seq_len=size[1], **settings)


# Each group adds a dimension that the groups before it leave open: a run that is cut short has seen a bit of everything
# that matters most.
CASES: Final[tuple[Case, ...]] = (
    # The published settings, and each lever alone.
    _case(LLAMA_7B, (8, 728)),
    _case(LLAMA_8B, (2, 728)),
    _case(LLAMA_8B, (2, 728), loss="chunked"),
    _case(LLAMA_8B, (2, 728), checkpointing="none"),
    _case(QWEN_HALF_B, (8, 512), checkpointing="none", blocks="all"),
    # Cuts.
    _case(LLAMA_7B, (8, 728), cut="attn-mlp"),
    _case(LLAMA_7B, (8, 728), cut="matrix"),
    _case(QWEN_HALF_B, (8, 512), method="adam", checkpointing="none"),
    _case(LLAMA_1B, (8, 728), method="badam-ratio"),
    _case(LLAMA_8B, (2, 728), method="lora"),
    _case(LLAMA_8B, (2, 728), method="lomo"),
    # badam 1.4's optimizer in the same places.
    _case(LLAMA_7B, (8, 728), side="badam-1.4"),
    _case(LLAMA_8B, (2, 728), side="badam-1.4"),
    # Largest models, long sequences.
    _case(LLAMA_13B, (2, 1024)),
    _case(LLAMA_8B, (1, 8192), loss="chunked"),
    _case(LLAMA_8B, (1, 8192)),
    _case(LLAMA_7B, (1, 728), method="adam"),
    # Batch × length on one small model.
    *(
        _case(LLAMA_1B, size, checkpointing=checkpointing)
        for size, checkpointing in itertools.product([(1, 256), (4, 1024), (16, 512), (8, 4096)], ["all", "none"])
    ),
    # Other architectures.
    _case(GEMMA_2B, (4, 512)),
    _case(GEMMA_2B, (4, 512), checkpointing="none", loss="chunked"),
    _case(PHI, (4, 1024), checkpointing="none"),
    _case(MISTRAL, (4, 1024)),
    _case(QWEN3_8B, (4, 1024), loss="chunked"),
    _case(QWEN_7B, (4, 1024), cut="attn-mlp"),
    _case(GEMMA_9B, (2, 512)),
    # Every block of a 7B model, a list of layers to checkpoint, accumulation.
    _case(LLAMA_7B, (8, 728), blocks="all"),
    _case(LLAMA_8B, (2, 728), checkpointing="list"),
    _case(LLAMA_8B, (2, 728), grad_accum=4),
    # More of the same kinds.
    _case(QWEN_HALF_B, (32, 512), loss="chunked"),
    _case(QWEN_HALF_B, (8, 512), method="badam-ratio", checkpointing="none"),
    _case(LLAMA_3B, (4, 2048)),
    _case(LLAMA_3B, (4, 2048), method="adam"),
    _case(LLAMA_3B, (4, 2048), cut="matrix", checkpointing="none", loss="chunked"),
    _case(LLAMA_7B, (2, 728), method="badam-ratio"),
    _case(LLAMA_7B, (8, 728), method="lora"),
    _case(LLAMA_7B, (8, 728), method="lomo"),
    _case(LLAMA_13B, (2, 1024), cut="matrix", loss="chunked"),
    _case(LLAMA_13B, (8, 2048), checkpointing="none"),
    _case(LLAMA_1B, (8, 728), side="badam-1.4"),
    _case(LLAMA_1B, (8, 728)),
    _case(LLAMA_13B, (2, 1024), side="badam-1.4"),
    _case(LLAMA_13B, (1, 512), method="adam"),  # more than any card has: the refusal is the result
)


def select(cases: Sequence[Case], patterns: Iterable[str]) -> tuple[Case, ...]:
    """The cases whose name matches one of ``patterns`` (shell style, anywhere in the name); all without patterns.

    Raises:
        InputError: if a pattern matches none.
    """
    patterns = tuple(patterns)
    for pattern in patterns:
        if not any(_matches(case, pattern) for case in cases):
            raise InputError(f"No case matches {pattern!r}.", advice="See their names with --list.")
    return tuple(case for case in cases if not patterns or any(_matches(case, pattern) for pattern in patterns))


def _matches(case: Case, pattern: str) -> bool:
    return fnmatch.fnmatchcase(case.name, f"*{pattern}*")


def load_cases(path: Path) -> tuple[Case, ...]:
    """Cases from a JSON file that holds a list of them.

    Raises:
        InputError: if it cannot be read, or holds something else, or two cases with one name.
    """
    try:
        cases = TypeAdapter(tuple[Case, ...]).validate_python(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        raise InputError(f"Cannot read cases from {path}: {error}") from error
    names = [case.name for case in cases]
    if len(set(names)) < len(names):
        raise InputError(f"Two cases in {path} have the same name.", advice="Names are made from the settings.")
    return cases

"""What fits at other batch sizes and lengths, everything else as in a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from badam.plan import Plan
from badam.training.build import model_config
from badam.training.tasks import input_positions
from badam.vocabulary import SegmentsChoice
from badam_planner.rehearsal.evaluator import Evaluator
from badam_planner.rehearsal.model_tree import ModelTree
from badam_planner.search.result import SizeCell, SizeMap
from badam_planner.search.settings import MemorySetting, first_fitting, ladder

FACTORS = (0.25, 0.5, 1, 2, 4, 8)
"""Batch sizes and lengths to look at, relative to those of the plan."""

SHORTEST = 32


def map_sizes(plan: Plan, evaluator: Evaluator, progress: Callable[[str], None] = lambda _text: None) -> SizeMap:
    """For each size the fastest setting of checkpointing and loss that fits, and what the worst block then needs.

    More sequences or longer ones never need less, so a size is asked only with the settings that all smaller sizes
    leave open, and not at all once a smaller one did not fit.
    """
    training = plan.training
    batches = sizes_around(training.batch_size, 1)
    fixed = input_positions(model_config(plan.model), plan.model.task) is not None
    lengths = [training.seq_len] if fixed else sizes_around(training.seq_len, SHORTEST)
    lengths = [length for length in lengths if length <= max(_longest(plan), training.seq_len)]
    segments: SegmentsChoice = "on" if plan.target.expandable_segments else "off"
    settings = ladder("auto", "auto", evaluator.tree.can_chunk, expandable_segments=segments)
    evaluator.expect_sizes(batches, lengths)
    first_open: dict[tuple[int, int], int] = {}  # index of the first setting that fits; len(settings) where none does
    cells = []
    for row, batch in enumerate(batches):
        for column, length in enumerate(lengths):
            begin = max(first_open.get((row - 1, column), 0), first_open.get((row, column - 1), 0))
            progress(f"batch {batch} of {length} tokens")
            peak_with = partial(_peak_if_it_fits, plan, batch, length, evaluator)
            index, peak = first_fitting(settings[begin:], peak_with)
            first_open[row, column] = begin + index
            cells.append(_cell(batch, length, settings, begin + index, peak))
    return SizeMap(plan.target.usable_bytes, training.batch_size, training.seq_len, tuple(cells))


def sizes_around(size: int, smallest: int) -> list[int]:
    """``size`` with smaller and larger ones, in order."""
    return sorted({max(int(size * factor), min(size, smallest)) for factor in FACTORS})


def resized(plan: Plan, batch_size: int, seq_len: int, setting: MemorySetting, tree: ModelTree) -> Plan:
    """The plan at another size, with other levers and without its prediction."""
    layers = tree.layers if setting.checkpointing == "all" else ()
    blocks = tuple(
        block.model_copy(update={"checkpointed_layers": layers, "peak_allocated_bytes": None})
        for block in plan.partition.blocks
    )
    choices = {"checkpointing": setting.checkpointing, "loss": setting.loss}
    return plan.model_copy(
        update={
            "partition": plan.partition.model_copy(update={"blocks": blocks}),
            "training": plan.training.model_copy(update={"batch_size": batch_size, "seq_len": seq_len, **choices}),
            "prediction": None,
        }
    )


def _peak_if_it_fits(plan: Plan, batch: int, length: int, evaluator: Evaluator, setting: MemorySetting) -> int | None:
    """The device peak at another size, or None if it is more than the card has."""
    other = resized(plan, batch, length, setting, evaluator.tree)
    found = evaluator.worst_block(other, give_up_above=plan.target.usable_bytes)
    return None if found is None else found.worst.peak_device_bytes


def _cell(batch: int, length: int, settings: Sequence[MemorySetting], index: int, peak: int | None) -> SizeCell:
    if index == len(settings):
        return SizeCell(batch, length, "", "", None)
    return SizeCell(batch, length, settings[index].checkpointing, settings[index].loss, peak)


def _longest(plan: Plan) -> int:
    """Positions that the model has; without a word on it, any."""
    config = plan.model.config
    known = [config[name] for name in ("max_position_embeddings", "n_positions", "max_seq_len") if config.get(name)]
    return int(min(known)) if known else 2**30

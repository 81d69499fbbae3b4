"""Which sizes fit, asked of an evaluator that answers by a formula."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from badam.plan import Plan, Training
from badam.units import GIB
from badam_planner.rehearsal.evaluator import Evaluator
from badam_planner.search.settings import MemorySetting
from badam_planner.search.size_map import map_sizes, resized, sizes_around
from tests.badam_planner import factories


class Formula:
    """10 GiB and 4 GiB per thousand tokens, half of it with checkpointing; counts what it is asked."""

    tree = SimpleNamespace(layers=("model.layers.0",), can_chunk=False)

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, str]] = []

    def expect_sizes(self, *_: object) -> None:
        """A formula needs no rehearsal."""

    def worst_block(self, plan: Plan, *, give_up_above: int) -> Any:
        training = plan.training
        self.asked.append((training.batch_size, training.seq_len, training.checkpointing))
        per_token = 4 * GIB // 1024 // (2 if training.checkpointing == "all" else 1)
        needed = 10 * GIB + training.batch_size * training.seq_len * per_token
        return SimpleNamespace(worst=SimpleNamespace(peak_device_bytes=needed)) if needed <= give_up_above else None


def plan_of_size(batch_size: int, seq_len: int, **config: Any) -> Plan:
    return factories.plan(
        model=factories.model(**config), training=Training(batch_size=batch_size, seq_len=seq_len, checkpointing="none")
    )


def test_every_size_gets_its_fastest_setting_that_fits() -> None:
    evaluator = Formula()
    found = map_sizes(plan_of_size(2, 512), cast(Evaluator, evaluator))
    assert found.usable_bytes == 23 * GIB
    for cell in found.cells:
        tokens = cell.batch_size * cell.seq_len
        expected = "none" if tokens <= 3328 else ("all" if tokens <= 6656 else "")
        assert cell.checkpointing == expected, (cell.batch_size, cell.seq_len)
        assert cell.fits == bool(expected)
    assert (2, 512, "none", "full", 14 * GIB) in {
        (cell.batch_size, cell.seq_len, cell.checkpointing, cell.loss, cell.peak_device_bytes) for cell in found.cells
    }


def test_what_a_smaller_size_has_ruled_out_is_not_asked_again() -> None:
    evaluator = Formula()
    map_sizes(plan_of_size(2, 512), cast(Evaluator, evaluator))
    assert len(evaluator.asked) == len(set(evaluator.asked))
    refused = [(b, s) for b, s, setting in evaluator.asked if setting == "none" and b * s > 3328]
    assert refused
    for batch, length in refused:
        assert not any((b, s) != (batch, length) and b >= batch and s >= length for b, s in refused)


def test_lengths_stay_within_the_positions_of_the_model() -> None:
    found = map_sizes(plan_of_size(1, 512, max_position_embeddings=1024), cast(Evaluator, Formula()))
    assert max(cell.seq_len for cell in found.cells) == 1024


@pytest.mark.parametrize(("size", "smallest", "expected"), [(2, 1, [1, 2, 4, 8, 16]), (20, 32, [20, 40, 80, 160])])
def test_sizes_lie_around_the_plans_own(size: int, smallest: int, expected: list[int]) -> None:
    assert sizes_around(size, smallest) == expected


def test_a_resized_plan_checkpoints_as_its_setting_says_and_predicts_nothing() -> None:
    tree: Any = Formula.tree
    other = resized(plan_of_size(1, 64), 4, 128, MemorySetting("all", "chunked"), tree)
    assert (other.training.batch_size, other.training.seq_len, other.training.loss) == (4, 128, "chunked")
    assert {block.checkpointed_layers for block in other.partition.blocks} == {("model.layers.0",)}
    assert other.prediction is None

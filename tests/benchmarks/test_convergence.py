"""The contest of benchmarks.convergence: rates by one rule, runs that go on where they were, a page from records."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import convergence
from benchmarks.learning import page as page_module
from benchmarks.learning.contest import (
    CONTESTANTS,
    EPOCHS_CONTESTANTS,
    Settings,
    epochs_settings,
    few_updates_settings,
    plan_of,
)
from benchmarks.learning.corpus import batches
from benchmarks.learning.plot import COLOURS, Axis, Series, render
from benchmarks.learning.rates import best_position, next_position, rate_at
from benchmarks.learning.records import ContestantRecord, Point, RunRecord, load_contestant

SETTINGS = Settings()


def run_of(rate: float, seed: int, loss: float = 1.0) -> RunRecord:
    points = (Point(step=0, seconds=0.0, loss=6.0), Point(step=96, seconds=9.6, loss=loss))
    return RunRecord(rate=rate, seed=seed, peak_bytes=2**20, points=points)


def tried(loss_of: dict[int, float]) -> list[int]:
    """The order in which positions are tried."""
    losses: dict[int, float] = {}
    order = []
    while (position := next_position(losses)) is not None:
        order.append(position)
        losses[position] = loss_of[position]
    return order


def test_three_rates_are_tried_and_a_fourth_beyond_the_best_if_it_is_at_the_edge() -> None:
    assert tried({0: 1.0, -1: 2.0, 1: 2.0}) == [0, -1, 1]
    assert tried({0: 2.0, -1: 3.0, 1: 1.0, 2: 0.5}) == [0, -1, 1, 2]
    assert tried({0: 2.0, -1: 1.0, 1: 3.0, -2: 2.0}) == [0, -1, 1, -2]


def test_a_loss_that_is_no_number_is_the_worst() -> None:
    assert best_position({0: math.nan, -1: 5.0, 1: math.inf}) == -1


def test_rates_lie_half_a_decade_apart() -> None:
    assert [rate_at(1e-3, position) for position in (-1, 0, 1, 2)] == [3.2e-4, 1e-3, 3.2e-3, 1e-2]


def test_a_stopped_contest_makes_no_run_twice(tmp_path: Path) -> None:
    contestant, made = CONTESTANTS[0], []

    def run(rate: float, seed: int) -> RunRecord:
        made.append((rate, seed))
        if len(made) == 4:
            raise KeyboardInterrupt
        return run_of(rate, seed, loss=abs(math.log10(rate) + 3))

    empty = ContestantRecord(settings_digest="x", name=contestant.name)
    with pytest.raises(KeyboardInterrupt):
        convergence.compete(contestant, empty, run, tmp_path, (0, 1, 2))
    again = load_contestant(tmp_path, contestant.name, "x")
    whole = convergence.compete(contestant, again, run, tmp_path, (0, 1, 2))
    assert made == [(1e-3, 0), (3.2e-4, 0), (3.2e-3, 0), (1e-3, 1), (1e-3, 1), (1e-3, 2)]
    assert load_contestant(tmp_path, contestant.name, "x") == whole
    assert load_contestant(tmp_path, contestant.name, "other settings").runs == ()


def test_every_method_that_trains_on_a_cpu_takes_part_with_the_same_tokens() -> None:
    assert {contestant.method for contestant in CONTESTANTS} == {
        "adam", "badam", "badam-ratio", "lora", "lomo", "adalomo", "galore", "lisa", "hift", "mezo",
    }  # fmt: skip
    assert len({SETTINGS.steps * SETTINGS.batch_size * SETTINGS.seq_len for _ in CONTESTANTS}) == 1
    assert {contestant.name for contestant in CONTESTANTS} == set(COLOURS)


def test_plans_of_blocks_include_the_ends_of_the_model() -> None:
    layers = next(contestant for contestant in CONTESTANTS if contestant.name == "badam, layers")
    plan = plan_of(layers, SETTINGS, rate=1e-3, seed=2)
    names = [block.name for block in plan.partition.blocks]
    assert (len(names), names[0], names[-1]) == (8, "embedding", "lm_head")
    assert plan.model.parameters > 10_000_000
    assert plan.schedule.seed == 2


def test_batches_are_those_of_the_seed_and_pass_over_all_examples() -> None:
    examples = [{"input_ids": [index], "labels": [index]} for index in range(6)]

    def first(seed: int) -> list[int]:
        source = batches(examples, 2, seed)
        return [example["input_ids"][0] for _ in range(6) for example in next(source)]

    assert first(0) == first(0) != first(1)
    assert sorted(first(0)[:6]) == sorted(first(0)[6:]) == list(range(6))


def test_the_page_ranks_by_mean_loss_and_measures_gains_by_adams() -> None:
    standing = [
        page_module.Standing("adam", 1e-3, tuple(run_of(1e-3, seed, 4.0) for seed in range(3)), (1e-3,)),
        page_module.Standing("lomo", 1e-1, tuple(run_of(1e-1, seed, 5.0 + seed / 10) for seed in range(3)), (1e-1,)),
    ]
    assert standing[1].mean_loss == pytest.approx(5.1)
    picture = ElementTree.fromstring(render(page_module.series(SETTINGS, standing)))
    assert {element.text for element in picture.iter() if element.tag.endswith("title")} == {"adam", "lomo"}


def test_ticks_are_round_and_inside() -> None:
    assert Axis(5.43, 6.71, 0, 1).ticks == [5.6, 5.8, 6.0, 6.2, 6.4, 6.6]
    assert Axis(0, 24.6, 0, 1).ticks == [0, 5, 10, 15, 20]


def test_an_svg_has_a_line_per_panel_and_a_dot_per_contestant() -> None:
    one = Series("adam", (0.0, 24.6), (0.0, 9.0), (6.0, 5.0), 190.0)
    text = render([one])
    assert (text.count("<polyline"), text.count("<circle")) == (2, 1)


def test_the_page_and_its_picture_are_those_of_the_records(tmp_path: Path) -> None:
    page = tmp_path / "convergence.md"
    page.write_text(convergence.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    page_module.write_page(SETTINGS, convergence.RECORDS, page)
    assert page.read_text(encoding="utf-8") == convergence.PAGE.read_text(encoding="utf-8")
    picture = convergence.PAGE.with_suffix(".svg").read_text(encoding="utf-8")
    assert page.with_suffix(".svg").read_text(encoding="utf-8") == picture
    longer = convergence.PAGE.with_name("convergence-epochs.svg").read_text(encoding="utf-8")
    assert page.with_name("convergence-epochs.svg").read_text(encoding="utf-8") == longer


def test_longer_runs_want_the_contests_rate_and_the_one_below_before_any_other() -> None:
    search = partial(next_position, first=(0, -1), most=3)
    assert search({}) == 0
    assert search({0: 2.0}) == -1
    assert search({0: 2.0, -1: 1.0}) == -2
    assert search({0: 1.0, -1: 2.0}) == 1
    assert search({0: 2.0, -1: 1.0, -2: 3.0}) is None


def test_a_table_ranks_by_the_best_evaluation_and_names_every_rate() -> None:
    def run(rate: float, *losses: float) -> RunRecord:
        points = (Point(step=i, seconds=i, loss=loss, training_loss=1.0) for i, loss in enumerate(losses))
        return RunRecord(rate=rate, seed=0, peak_bytes=1, points=tuple(points))

    rows = [("lora", 9, [run(1e-3, 6.0, 5.8)]), ("adam", 9, [run(1e-4, 6.0, 5.6), run(1e-3, 6.0, 5.0, 5.5)])]
    lines = page_module._ranked_table(rows).splitlines()
    assert lines[2] == "| adam | 9 | 5.000 | 100% | 5.500 | 1.000 | 1.0e-03 | 1.0e-04, 1.0e-03 |"
    assert lines[3].startswith("| lora | 9 | 5.800 | 20% |")
    assert page_module._ranked_table(rows[:1]) == ""


def test_three_epochs_give_every_block_a_visit_in_each() -> None:
    settings, layers = epochs_settings(), EPOCHS_CONTESTANTS[0]
    blocks = len(plan_of(layers, settings, 1e-3, 0).partition.blocks)
    assert settings.training_pairs == settings.batch_size * blocks * layers.switch_every
    assert settings.steps == 3 * blocks * layers.switch_every
    assert few_updates_settings().steps == settings.steps // blocks


def test_a_new_setting_that_is_not_used_leaves_records_valid() -> None:
    assert load_contestant(convergence.RECORDS, "adam", SETTINGS.digest).runs

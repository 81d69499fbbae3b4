from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from badam.errors import InputError
from badam.plan import Plan, record_digest
from badam.units import GIB, MIB
from badam.vocabulary import Category, Phase
from badam_planner.accuracy.compare import EXACT_CATEGORIES, compare, explain, fold_categories, plan_of, summarize
from badam_planner.accuracy.comparison import Pair
from tests.badam_planner import factories

SIZES = st.integers(0, 2**44)
SPLITS = st.dictionaries(st.sampled_from(list(Category)), SIZES, min_size=1)


@given(SPLITS)
def test_folding_keeps_the_sum_and_the_exact_categories(split: dict[Category, int]) -> None:
    folded = fold_categories(split)
    assert sum(folded.values()) == sum(split.values())
    assert set(folded) <= {*EXACT_CATEGORIES, Category.ACTIVATION}
    assert all(folded[category] == split[category] for category in EXACT_CATEGORIES if category in split)


@given(SPLITS, SPLITS, SIZES, SIZES)
def test_categories_sum_to_the_peak_whatever_the_records_say(
    predicted: dict[Category, int], measured: dict[Category, int], predicted_peak: int, measured_peak: int
) -> None:
    plan = factories.plan(prediction={"by_category": predicted, "peak_allocated_bytes": predicted_peak})
    run = factories.measured_run(plan, measurement={"by_category": measured, "peak_allocated_bytes": measured_peak})
    comparison = compare(plan, run)
    assert sum(row.memory.predicted or 0 for row in comparison.categories) == predicted_peak
    assert sum(row.memory.measured or 0 for row in comparison.categories) == measured_peak


def test_unattributed_bytes_get_a_row_only_where_there_are_some() -> None:
    plan = factories.plan()
    whole = compare(plan, factories.measured_run(plan))
    assert [row.category for row in whole.categories] == [*EXACT_CATEGORIES, Category.ACTIVATION]
    split = {Category.PARAMETER: 10 * GIB, Category.ACTIVATION: 10 * GIB}
    partial = compare(plan, factories.measured_run(plan, measurement={"by_category": split}))
    assert partial.categories[-1].name == "not attributed"
    assert partial.categories[-1].memory == Pair(0, 256 * MIB)


def test_error_is_predicted_less_measured_as_a_share_of_the_measured() -> None:
    assert Pair(90, 100).error_bytes == -10
    assert Pair(90, 100).error_fraction == -0.1
    assert Pair(0, 0).error_fraction == 0
    assert Pair(5, 0).error_fraction is None
    assert Pair(None, 5).error_bytes is None


def test_rows_carry_the_figures_of_both_records() -> None:
    plan = factories.plan()
    comparison = compare(plan, factories.measured_run(plan))
    assert [(row.name, row.memory.error_bytes) for row in comparison.totals] == [
        ("allocated", -256 * MIB),
        ("reserved", 0),
        ("device", 0),
    ]
    assert {row.phase: row.seconds for row in comparison.phases} == factories.SECONDS_BY_PHASE
    assert all(row.memory.error_bytes == -256 * MIB for row in comparison.phases)
    assert [row.name for row in comparison.blocks] == ["layer 0", "layer 1", "layer 2"]
    assert comparison.notes == ()


def test_a_phase_that_only_one_side_knows_is_shown_without_an_error() -> None:
    plan = factories.plan(prediction={"by_phase": {Phase.RECOMPUTE: GIB}})
    rows = {row.phase: row for row in compare(plan, factories.measured_run(plan)).phases}
    assert rows[Phase.RECOMPUTE].memory == Pair(GIB, None)
    assert rows[Phase.FORWARD].memory.error_fraction is None


def test_verdict_names_the_worst_judged_peak_and_keeps_the_tolerance() -> None:
    plan = factories.plan()
    run = factories.measured_run(plan)
    passed = compare(plan, run, tolerance=0.02).verdict
    assert passed.passed
    assert passed.worst_name == "block layer 2"
    assert not compare(plan, run, tolerance=0.013).verdict.passed


def test_verdict_judges_reserved_memory_too() -> None:
    plan = factories.plan()
    run = factories.measured_run(plan, measurement={"peak_reserved_bytes": 30 * GIB})
    verdict = compare(plan, run).verdict
    assert (verdict.worst_name, verdict.passed) == ("reserved", False)


def test_predicted_bytes_where_none_were_measured_are_over_any_tolerance() -> None:
    plan = factories.plan()
    run = factories.measured_run(plan, measurement={"peak_reserved_bytes": 0})
    assert not compare(plan, run, tolerance=100.0).verdict.passed


def test_backward_shape_is_scaled_to_the_measured_sum() -> None:
    plan = factories.plan()
    rows = compare(plan, factories.measured_run(plan)).blocks
    assert [row.predicted_backward_seconds for row in rows] == pytest.approx([0.6, 0.4, 0.2])
    assert [row.backward_seconds for row in rows] == pytest.approx([0.6, 0.4, 0.2])


def test_recomputation_counts_as_backward_time() -> None:
    blocks = factories.block_measurements(1)
    seconds = {Phase.BACKWARD: 0.5, Phase.RECOMPUTE: 0.25}
    blocks = (blocks[0].model_copy(update={"seconds_by_phase": seconds}),)
    plan = factories.plan()
    row = compare(plan, factories.measured_run(plan, measurement={"blocks": blocks})).blocks[0]
    assert row.backward_seconds == 0.75


def test_unvisited_blocks_are_listed_noted_and_not_judged() -> None:
    plan = factories.plan()
    run = factories.measured_run(plan, measurement={"blocks": factories.block_measurements(2)})
    comparison = compare(plan, run)
    assert comparison.blocks[2].memory == Pair(18 * GIB, None)
    assert comparison.verdict.worst_name == "block layer 1"
    assert any("1 of 3 blocks were not visited" in note for note in comparison.notes)


def test_a_block_measured_in_no_step_was_not_visited() -> None:
    idle = factories.block_measurements(1, steps=0)[0].model_copy(update={"name": "layer 2", "peak_allocated_bytes": 0})
    plan = factories.plan()
    run = factories.measured_run(plan, measurement={"blocks": (*factories.block_measurements(2), idle)})
    comparison = compare(plan, run)
    assert comparison.blocks[2].memory.measured is None
    assert comparison.verdict.passed


def test_another_plan_file_and_other_settings_are_noted() -> None:
    plan = factories.plan()
    other = factories.plan(training=plan.training.model_copy(update={"batch_size": 4}))
    notes = compare(plan, factories.measured_run(other)).notes
    assert any("digests differ" in note for note in notes)
    assert "batch_size: the plan says 2, the run used 4." in notes


def test_another_model_is_refused() -> None:
    run = factories.measured_run(factories.plan(model=factories.model("acme/other", num_hidden_layers=9)))
    with pytest.raises(InputError, match="acme/other"):
        compare(factories.plan(), run)


def test_a_plan_without_prediction_is_refused_with_the_command_that_makes_one() -> None:
    plan = factories.plan().model_copy(update={"prediction": None})
    with pytest.raises(InputError, match="badam-plan acme/tiny-7b --gpu rtx3090"):
        compare(plan, factories.measured_run(plan))


def test_explain_names_the_part_most_off_and_a_moved_peak() -> None:
    plan = factories.plan()
    run = factories.measured_run(plan, measurement={"peak_phase": Phase.STEP})
    assert explain(compare(plan, run)) == (
        "the part most off is activation and rest, predicted too low; "
        "the peak was predicted in backward and measured in step"
    )


def test_explain_of_an_exact_prediction() -> None:
    plan = factories.plan()
    exact = {"by_category": fold_categories(factories.BY_CATEGORY), "peak_allocated_bytes": 20 * GIB}
    assert explain(compare(plan, factories.measured_run(plan, measurement=exact))) == "every part is exact"


@pytest.mark.parametrize(
    ("predicted", "measured", "counts"),
    [
        (22 * GIB, 24 * GIB, (1, 0, 0)),
        (24 * GIB, 22 * GIB, (0, 1, 0)),
        (22 * GIB, 22 * GIB, (0, 0, 0)),
        (22 * GIB, None, (0, 0, 1)),
    ],
)
def test_wrong_fits_and_false_refusals_are_told_apart(
    predicted: int, measured: int | None, counts: tuple[int, int, int]
) -> None:
    plan = factories.plan(prediction={"peak_device_bytes": predicted})
    run = factories.measured_run(plan, measurement={"peak_device_bytes": measured})
    accuracy = summarize([compare(plan, run)])
    assert (accuracy.wrong_fits, accuracy.false_refusals, accuracy.undecided) == counts


def test_summary_takes_the_median_size_of_the_error_and_the_worst_run() -> None:
    plan = factories.plan()
    runs = [
        factories.measured_run(plan, measurement={"peak_allocated_bytes": peak})
        for peak in (20 * GIB, 16 * GIB, 25 * GIB)
    ]
    accuracy = summarize([compare(plan, run) for run in runs])
    assert accuracy.median_error == pytest.approx(0.2)
    assert accuracy.worst is accuracy.comparisons[1]


def test_each_run_finds_its_own_plan() -> None:
    first, second = factories.plan(), factories.plan(method="badam-ratio")
    assert plan_of(factories.measured_run(second), [first, second]) is second
    assert plan_of(factories.measured_run(factories.plan(method="adam")), [first, second]) is first


def test_a_plan_keeps_its_digest_when_a_later_version_adds_a_field() -> None:
    class LaterPlan(Plan):
        remark: str = ""

    plan = factories.plan()
    later = LaterPlan.model_validate_json(plan.model_dump_json())
    assert record_digest(later) == record_digest(plan)
    assert record_digest(later.model_copy(update={"remark": "other"})) != record_digest(plan)
    assert record_digest(factories.plan(method="lora")) != record_digest(plan)

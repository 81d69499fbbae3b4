"""Whatever the records say: the parts that a report shows sum to the total that it shows, in every rendering."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from badam.units import format_bytes
from badam.vocabulary import Category, Phase
from badam_planner.accuracy.compare import compare, predicted_parts
from badam_planner.accuracy.comparison import Comparison, Pair
from badam_planner.report.html.choice_charts import device_parts
from badam_planner.report.html.run_charts import parts_chart
from badam_planner.report.json import comparison_to_json
from badam_planner.report.terminal.comparison import memory_rows, phase_bars
from tests.badam_planner import factories

SIZES = st.integers(0, 2**40)
SPLITS = st.dictionaries(st.sampled_from(list(Category)), SIZES, max_size=len(Category))
PHASES = st.dictionaries(st.sampled_from(list(Phase)), SIZES, min_size=1)


@st.composite
def comparisons(draw: st.DrawFn) -> Comparison:
    """Records that may contradict themselves: their parts need not sum to their peak."""

    def side() -> dict[str, Any]:
        split, phases = draw(SPLITS), draw(PHASES)
        peak = draw(st.one_of(st.just(sum(split.values())), SIZES))
        return {
            "peak_allocated_bytes": peak, "by_category": split, "by_phase": phases,
            "peak_phase": draw(st.sampled_from(list(phases))),
        }  # fmt: skip

    plan = factories.plan(prediction=side())
    return compare(plan, factories.measured_run(plan, measurement=side()))


def sums(pairs: list[Pair]) -> tuple[int, int]:
    return sum(pair.predicted or 0 for pair in pairs), sum(pair.measured or 0 for pair in pairs)


@settings(max_examples=60, deadline=None)
@given(comparisons())
def test_parts_sum_to_the_peaks_in_every_rendering(comparison: Comparison) -> None:
    whole = comparison.allocated.predicted, comparison.allocated.measured
    assert sums([row.memory for row in comparison.categories]) == whole

    *parts, (name, last) = memory_rows(comparison)
    assert name == "sum"
    assert sums([pair for _, pair in parts]) == (last.predicted, last.measured) == whole

    content = json.loads(comparison_to_json(comparison))
    for side, total in zip(("predicted_bytes", "measured_bytes"), whole, strict=True):
        assert sum(part[side] for part in content["categories"]) == content["totals"][0][side] == total

    chart = parts_chart(comparison.prediction, comparison)
    assert [row[0] for row in chart.table.rows] == [*(row.name for row in comparison.categories), "sum"]


@settings(max_examples=60, deadline=None)
@given(comparisons())
def test_every_bar_is_as_long_as_the_peak_of_its_phase(comparison: Comparison) -> None:
    shown = [row.memory for row in comparison.phases]
    expected = [size for pair in shown for size in (pair.predicted, pair.measured) if size is not None]
    assert [bar.total_bytes for bar in phase_bars(comparison)] == expected


@settings(max_examples=60, deadline=None)
@given(comparisons())
def test_the_parts_of_a_plan_alone_sum_to_its_peak(comparison: Comparison) -> None:
    parts = predicted_parts(comparison.prediction)
    assert sum(parts.values()) == comparison.prediction.peak_allocated_bytes
    *rows, last = parts_chart(comparison.prediction, None).table.rows
    assert [name for name, _ in rows] == list(parts)
    assert last == ("sum", format_bytes(comparison.prediction.peak_allocated_bytes))


@settings(max_examples=60, deadline=None)
@given(SPLITS, SIZES, SIZES)
def test_the_parts_of_a_candidate_sum_to_its_device_peak(
    split: dict[Category, int], reserved: int, context: int
) -> None:
    candidate = factories.candidate(
        by_category=split, peak_reserved_bytes=reserved, peak_device_bytes=reserved + context
    )
    assert sum(device_parts(candidate).values()) == reserved + context

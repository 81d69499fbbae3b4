"""What badam-plan shows of several cards: bytes, times on links, and what a step takes with them."""

from __future__ import annotations

from typing import Any

import pytest

from badam.plan import Plan
from badam_planner.multi_gpu.links import LINKS, step_range
from badam_planner.report.terminal.plan import render_transfers
from tests.badam_planner import factories
from tests.badam_planner.report.rendering import render

SENT = 315 * 10**8  # a second over PCIe 4.0


def plan_on(engine: str, step_seconds: float | None, **target: Any) -> Plan:
    plan = factories.plan()
    assert plan.prediction is not None
    sent = {"sent_bytes": SENT, "sent_bytes_of_full": 2 * SENT, "step_seconds": step_seconds}
    return plan.model_copy(
        update={
            "target": plan.target.model_copy(update={"engine": engine, "num_gpus": 4, **target}),
            "prediction": plan.prediction.model_copy(update=sent),
        }
    )


def row_of(plan: Plan, link: str) -> list[str]:
    """The cells of a link's row."""
    lines = render(render_transfers(plan), 120).splitlines()
    (line,) = (line for line in lines if line.startswith(link))
    return [cell for cell in line.removeprefix(link).split("  ") if cell.strip()]


def test_a_step_takes_between_the_longer_of_computation_and_transfers_and_their_sum() -> None:
    cells = [cell.strip() for cell in row_of(plan_on("fsdp2", 3.0), "PCIe 4.0 x16")]
    assert cells == ["1.0 s", "2.0 s", "3.0 s to 4.0 s"]
    cells = [cell.strip() for cell in row_of(plan_on("zero3", 0.25), "PCIe 4.0 x16")]
    assert cells[-1] == "1.0 s to 1.2 s"


def test_whole_copies_average_after_backward_so_that_both_times_add_up() -> None:
    assert row_of(plan_on("ddp", 3.0), "PCIe 4.0 x16")[-1].strip() == "4.0 s"


def test_without_a_predicted_time_no_step_is_shown() -> None:
    assert len(row_of(plan_on("fsdp2", None), "PCIe 4.0 x16")) == 2
    assert "A step" not in render(render_transfers(plan_on("fsdp2", None)), 120)


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_table_fits_the_terminal(width: int) -> None:
    lines = render(render_transfers(plan_on("fsdp2", 3.0, num_gpus=16)), width).splitlines()
    assert max(map(len, lines)) <= width
    assert all(any(line.startswith(link.name[:6]) for line in lines) for link in LINKS)


@pytest.mark.parametrize(("compute", "transfer"), [(1.0, 3.0), (3.0, 1.0), (2.0, 0.0)])
def test_overlapping_never_makes_a_step_longer(compute: float, transfer: float) -> None:
    shortest, longest = step_range(compute, transfer, overlaps=True)
    assert max(compute, transfer) == shortest <= longest == compute + transfer
    assert step_range(compute, transfer, overlaps=False) == (longest, longest)

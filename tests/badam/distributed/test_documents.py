"""The page on several GPUs has the stored results of running several processes against one."""

from __future__ import annotations

from benchmarks import several_processes


def test_the_table_of_several_processes_is_that_of_the_stored_results() -> None:
    page = several_processes.PAGE.read_text(encoding="utf-8")
    table = several_processes.table(several_processes.stored())
    assert f"{several_processes.BEGIN}\n{table}\n" in page
    assert table.count("\n") == 1 + len(several_processes.LAYOUTS)


def test_the_stored_runs_of_several_processes_equal_that_of_one() -> None:
    for row in several_processes.stored():
        losses = (row.loss_difference, row.resumed_loss_difference or 0.0)
        weights = (row.weight_difference, row.resumed_weight_difference or 0.0)
        assert max(*losses, *weights) <= 1e-5
    assert sum(row.resumed_loss_difference is not None for row in several_processes.stored()) == 3


def test_the_stored_peaks_under_fsdp2_were_predicted_within_five_percent() -> None:
    rows = [row for row in several_processes.stored() if row.layout.startswith(("FSDP2", "whole"))]
    assert len(rows) == 5
    assert max(abs(row.peak_error) for row in rows) <= 0.05

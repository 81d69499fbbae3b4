from __future__ import annotations

from tests.badam.distributed.workers import results_of
from tests.badam.profiling.memory import gloo_jobs as jobs


def test_what_was_sent_is_released_where_reports_are_read_and_waiting_is_torchs_own_afterwards() -> None:
    wanted = {"left": (jobs.bytes_left_after_messages, {}), "wait": (jobs.wait_before_and_after, {})}
    for found in results_of(2, wanted):
        assert found["left"] == {"gather": 0, "reduce_scatter": 0, "all_reduce": 0, "awaited_later": 0}
        assert found["wait"]

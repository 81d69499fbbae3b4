"""Processes that get ready beside each other and have the device one after the other."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.pool import Limits, Pool
from tests.benchmarks.jobs import job


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    path.touch()
    return path


def run(orders: list[dict[str, Any]], log: Path, **limits: Any) -> tuple[list[str], dict[str, int]]:
    """Run jobs; returns the names that were left, and exit codes by name."""
    codes: dict[str, int] = {}
    settings = Limits(**{"seconds": 60, "seconds_per_job": 60, "ahead": 2, **limits})
    pool = Pool(job, settings, lambda name, code, _seconds: codes.__setitem__(name, code))
    left = pool.run((order["name"], {**order, "log": str(log)}) for order in orders)
    return left, codes


def test_one_job_at_a_time_has_the_device(log: Path) -> None:
    left, codes = run([{"name": name, "seconds": 0.05} for name in "abc"], log)
    assert left == []
    assert codes == {"a": 0, "b": 0, "c": 0}
    lines = log.read_text().splitlines()
    assert sorted(line.split()[0] for line in lines) == ["a", "a", "b", "b", "c", "c"]
    for begins, ends in zip(lines[::2], lines[1::2], strict=True):
        assert (begins.split()[0], begins.split()[1]) == (ends.split()[0], "begins")


def test_a_process_that_dies_or_never_gets_ready_does_not_keep_the_next_one_from_running(log: Path) -> None:
    orders: list[dict[str, Any]] = [
        {"name": "killed", "dies": True},
        {"name": "refuses", "fails": True},
        {"name": "good"},
    ]
    left, codes = run(orders, log)
    assert left == []
    assert codes == {"killed": -signal.SIGKILL, "refuses": 3, "good": 0}


def test_a_job_that_takes_too_long_is_stopped_and_the_next_one_runs(log: Path) -> None:
    orders: list[dict[str, Any]] = [{"name": "slow", "seconds": 60}, {"name": "good"}]
    left, codes = run(orders, log, seconds_per_job=0.5, ahead=0)
    assert left == []
    assert codes == {"slow": -signal.SIGKILL, "good": 0}


def test_when_time_is_up_the_rest_is_left_over(log: Path) -> None:
    orders: list[dict[str, Any]] = [{"name": "slow", "seconds": 60}, {"name": "later"}]
    left, codes = run(orders, log, seconds=1.0, ahead=0)
    assert left == ["slow", "later"]
    assert codes == {}

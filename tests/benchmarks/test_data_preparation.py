"""The benchmark of data preparation, with few records."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_it_tells_seconds_and_memory_of_the_records_it_made() -> None:
    words = [sys.executable, "-W", "ignore", "-m", "benchmarks.data_preparation", "400"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "400 records: " in done.stdout
    assert "400 examples of " in done.stdout

"""What tests of measured memory share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture
def nothing_left_over() -> Iterator[None]:
    """Models of earlier tests that wait in reference cycles would count as memory of this one."""
    gc.collect()
    yield
    gc.collect()

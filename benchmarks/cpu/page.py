"""The documentation's page, from records. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.cpu.cases import Case
from benchmarks.cpu.record import Outcome


def page(outcomes: Sequence[Outcome], cases: Sequence[Case]) -> str:
    return ""

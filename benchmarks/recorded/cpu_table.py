"""Forty cases of the CPU's accuracy table: what is predicted for each, and what its run measures."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from benchmarks.cpu.cases import Case as TableCase
from benchmarks.cpu.cases import all_cases
from benchmarks.cpu.run import run_case
from benchmarks.recorded import forks
from benchmarks.recorded.plain import without

COUNT, STRIDE = 40, 13
"""The stride has no factor in common with twelve architectures, ten methods and four settings."""

LEFT_OUT = {
    "seconds", "date", "machine", "versions", "command",
    "worst_name", "worst_error",  # follow from what is predicted and measured, of which the latter varies by some bytes
}  # fmt: skip


def cases() -> dict[str, forks.Case]:
    """Forty of all cases, among them every architecture, method, length and both kinds of checkpointing."""
    every = list(all_cases())
    chosen = [every[STRIDE * number % len(every)] for number in range(COUNT)]
    return {case.name: partial(plan_and_run, case) for case in chosen}


def plan_and_run(case: TableCase) -> dict[str, Any]:
    """The record of one case as the table has it."""
    outcome = run_case(case)
    if outcome.refusal:
        raise ValueError(outcome.refusal)
    found: dict[str, Any] = without(json.loads(outcome.model_dump_json()), LEFT_OUT)
    return found

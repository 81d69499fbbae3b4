"""Records as plain values: without what differs from run to run, and large ones as digests. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from typing import Any

DIGITS = 12
"""Significant digits kept of fractions.

The planner adds up seconds of modules in the order of a set, which is another one in every process: the last two of
sixteen digits differ between two runs of the same code.
"""


def without(value: Any, fields: Collection[str]) -> Any:
    """A copy without the named fields, at any depth, and with fractions rounded to :data:`DIGITS`."""
    if isinstance(value, dict):
        return {name: without(inner, fields) for name, inner in value.items() if name not in fields}
    if isinstance(value, list | tuple):
        return [without(inner, fields) for inner in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def digest(value: Any) -> str:
    """The first 16 hexadecimal digits of the sha256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

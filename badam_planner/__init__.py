"""Plans block-coordinate fine-tuning: which partition fits which card, at which peak and speed.

Names are loaded on first use, so that reading one of its modules does not load the others.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from badam.plan import load_plan as load_plan
    from badam_planner.interface import compare_methods as compare_methods
    from badam_planner.interface import plan as plan
    from badam_planner.interface import sizes as sizes
    from badam_planner.search.question import Question as Question

__all__ = ["Question", "compare_methods", "load_plan", "plan", "sizes"]

_HOMES = {
    "Question": "badam_planner.search.question",
    "compare_methods": "badam_planner.interface",
    "load_plan": "badam.plan",
    "plan": "badam_planner.interface",
    "sizes": "badam_planner.interface",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Measured memory and time of a training run.

``badam.profiling.record(optimizer, model, plan=...)`` measures a loop of your own; :mod:`badam.profiling.record`,
imported by its full name, holds the records that a run leaves behind.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from badam.plan import Plan
    from badam.profiling.recorder import Recording
    from badam.vocabulary import Profile

__all__ = ["record"]

# A submodule becomes an attribute of its package when it is first loaded. Loading it here, before the function of the
# same name is defined, keeps that from happening later and taking the function's place.
importlib.import_module("badam.profiling.record")


def record(
    optimizer: Optimizer, model: nn.Module, *, plan: Plan | None = None, profile: Profile = "normal"
) -> AbstractContextManager[Recording]:
    """Measure a training loop of your own within a ``with`` block; see :func:`badam.profiling.recorder.record`."""
    from badam.profiling import recorder

    return recorder.record(optimizer, model, plan=plan, profile=profile)

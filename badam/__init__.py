"""BAdam: block coordinate optimization for full-parameter fine-tuning, and what runs it.

Names are loaded on first use, so that reading a plan (``badam.plan``) does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from badam.integrations.accelerate import clip_grad_norm_old_version as clip_grad_norm_old_version
    from badam.integrations.transformers import BAdamCallback as BAdamCallback
    from badam.optim.block import BlockOptimizer as BlockOptimizer
    from badam.optim.ratio import BlockOptimizerRatio as BlockOptimizerRatio

__all__ = ["BAdamCallback", "BlockOptimizer", "BlockOptimizerRatio", "__version__", "clip_grad_norm_old_version"]

_HOMES = {
    "BlockOptimizer": "badam.optim.block",
    "BlockOptimizerRatio": "badam.optim.ratio",
    "BAdamCallback": "badam.integrations.transformers",
    "clip_grad_norm_old_version": "badam.integrations.accelerate",
}
_PATHS_OF_1_4 = ("block_optim", "utils")
"""Modules that badam 1.4 had loaded with the package, so that ``import badam; badam.utils`` found them."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("badam")
        except PackageNotFoundError:  # run from a source tree that was never installed
            return "0+source"
    if name in _PATHS_OF_1_4:
        return importlib.import_module(f"badam.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""The import path ``badam.block_optim`` of badam 1.4."""

from __future__ import annotations

from badam.optim.block import BlockOptimizer
from badam.optim.ratio import BlockOptimizerRatio

__all__ = ["BlockOptimizer", "BlockOptimizerRatio"]

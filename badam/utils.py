"""The import path ``badam.utils`` of badam 1.4, whose README names it."""

from __future__ import annotations

from badam.integrations.accelerate import clip_grad_norm_old_version
from badam.integrations.transformers import BAdamCallback

__all__ = ["BAdamCallback", "clip_grad_norm_old_version"]

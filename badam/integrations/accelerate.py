"""Gradient clipping for hosts that clip through accelerate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from badam.optim.base import hides_gradients, innermost_optimizer
from badam.tensors.functional import clip_gradients_


def clip_grad_norm_old_version(
    self: Any, parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2
) -> Tensor | None:
    """Stand in for ``Accelerator.clip_grad_norm_``: sees gradients that the optimizer keeps to itself, too.

    Bind it to an accelerator: ``accelerator.clip_grad_norm_ = MethodType(clip_grad_norm_old_version, accelerator)``.
    The name is badam 1.x's; the norm is computed in fp32 over dense and sparse gradients alike.

    Args:
        self: the accelerator.
        parameters: whose gradients to scale.
        max_norm: the joint norm that they may have.
        norm_type: of the p-norm; ``inf`` for the largest entry.

    Returns:
        The norm before, shape (). Under DeepSpeed, which clips by itself, the norm that it reports, or None.
    """
    if self.distributed_type == "DEEPSPEED":
        engine = getattr(self, "deepspeed_engine_wrapped", None)
        reported: Tensor | None = engine.get_global_grad_norm() if engine is not None else None
        return reported
    self.unscale_gradients()
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if self.distributed_type == "FSDP":
        for model in self._models:
            if hasattr(model, "clip_grad_norm_") and _same(parameters, model.parameters()):
                norm: Tensor = model.clip_grad_norm_(max_norm, norm_type)
                return norm
    hiding = [optimizer for optimizer in map(innermost_optimizer, self._optimizers) if hides_gradients(optimizer)]
    if hiding:
        norms = [optimizer.clip_grad_norm_(max_norm, norm_type) for optimizer in hiding]
        joint: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
        return joint
    return clip_gradients_([p.grad for p in parameters if p.grad is not None], max_norm, norm_type)


def _same(parameters: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    return [id(tensor) for tensor in parameters] == [id(tensor) for tensor in others]

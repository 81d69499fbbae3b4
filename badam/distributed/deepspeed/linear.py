"""A linear layer for weights that are taken apart between forward and backward, as ZeRO-3 takes them.

torch's own keeps a view of the weight for backward, and with it the whole matrix that was gathered. DeepSpeed's keeps
the parameter, but also the layer's input where the weight is frozen and nobody will ask for it: in block-coordinate
training that is most layers. This one keeps the input for weights that are trained, and of the parameter no more than
the name, so that neither autograd nor a checkpoint holds what DeepSpeed has let go of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from badam.tensors.dtensor import is_held_by_deepspeed, shape_of

_torchs: Callable[..., Tensor] = torch._C._nn.linear  # whatever others have put in the place of the function


class _Linear(torch.autograd.Function):
    """input [..., n], weight [m, n], bias [m] or None -> [..., m]."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: nn.Parameter, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # not saved: a checkpoint would detach it, and the copy would hold the gathered matrix
        ctx.save_for_backward(*((inputs,) if weight.requires_grad else ()))
        return _torchs(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, rows = ctx.weight, gradients[0].reshape(-1, gradients[0].shape[-1])
        of_weight = of_bias = of_inputs = None
        if ctx.needs_input_grad[1]:
            (inputs,) = ctx.saved_tensors
            of_weight = rows.t().mm(inputs.reshape(-1, inputs.shape[-1]))
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        if ctx.needs_input_grad[0]:
            with _gathered(weight):
                of_inputs = rows.mm(weight).view(*gradients[0].shape[:-1], weight.shape[-1])
        return of_inputs, of_weight, of_bias


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What ``torch.nn.functional.linear`` returns, for a weight that may be taken apart before backward."""
    found: Tensor = _Linear.apply(inputs, weight, bias)
    return found


@contextmanager
def linear_for_parameters() -> Iterator[None]:
    """:func:`linear` for every parameter, as :func:`use_for_partitioned` has it for those that are partitioned."""
    with patch.object(nn.functional, "linear", _chosen(lambda weight: True, _torchs)):
        yield


def use_for_partitioned() -> None:
    """From now on compute with :func:`linear` what has a parameter that DeepSpeed has partitioned."""
    before = nn.functional.linear
    if getattr(before, "chooses", None) is not is_held_by_deepspeed:
        nn.functional.linear = _chosen(is_held_by_deepspeed, before)


def _chosen(applies: Callable[[Tensor], bool], otherwise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def chosen(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002 - torch's names
        plain = not torch.is_autocast_enabled(input.device.type)
        ours = plain and isinstance(weight, nn.Parameter) and applies(weight)
        return linear(input, weight, bias) if ours else otherwise(input, weight, bias)

    chosen.chooses = applies  # type: ignore[attr-defined]
    return chosen


def _gathered(weight: nn.Parameter) -> Any:
    """The whole weight: DeepSpeed has it there for the backward of the module that owns it, not for other uses."""
    if tuple(weight.shape) == shape_of(weight):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight])

"""AdamW as one compiled pass: reads the model-dtype gradient, writes master, moments and weight.

A base optimizer needs an fp32 gradient beside the 16-bit one, and the write-back reads every master once more. Here
both are part of the update: per entry 14 bytes are read and 14 written for bf16, as many as fused AdamW alone moves
for fp32 parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from badam._active import ActiveParameter
from badam._master_groups import MasterGroups
from badam.errors import InputError
from badam.functional import clip_factor, gradient_norm, is_fake

_UNSUPPORTED_OPTIONS = ("amsgrad", "maximize", "differentiable")


class CompiledAdamW(MasterGroups):
    """Takes the place of ``AdamW.step``; options, state and what is saved stay those of the base optimizer.

    Agrees with ``torch.optim.AdamW`` within rounding of fp32, not bit for bit. On fake tensors only what the update
    allocates happens.

    Raises:
        InputError: if the base optimizer is not ``torch.optim.AdamW``, or has an option that the pass does not know.
    """

    def __init__(self, base: Optimizer) -> None:
        if type(base) is not AdamW:
            raise InputError(
                f'update="compiled" is AdamW; the base optimizer is {type(base).__name__}.',
                advice='Use torch.optim.AdamW as the base optimizer, or update="base".',
            )
        for group in base.param_groups:
            wrong = [option for option in _UNSUPPORTED_OPTIONS if group.get(option)]
            if wrong:
                raise InputError(
                    f'update="compiled" does not know AdamW\'s option {wrong[0]}.', advice='Use update="base".'
                )
        super().__init__(base)
        self._factor: Tensor | None = None

    def clip(self, gradients: Sequence[Tensor], max_norm: float, norm_type: float) -> Tensor:
        """Leave the scaling to the next step, which multiplies in passing; here it would round in the model's type."""
        norm = gradient_norm(gradients, norm_type)
        if self._factor is not None:
            norm = norm * self._factor
        factor = clip_factor(norm, max_norm)
        self._factor = factor if self._factor is None else self._factor * factor
        return norm

    def unclip(self) -> None:
        """Forget the factor that :meth:`clip` has left."""
        self._factor = None

    def step(self, members: Sequence[ActiveParameter]) -> None:
        """One AdamW step from the gradients of ``members``; they are released, the weights written."""
        factor = 1.0 if self._factor is None or is_fake(self._factor) else float(self._factor)
        self._factor = None
        by_parameter = {id(member.parameter): member for member in members}
        for group in self.base.param_groups:
            numbers: dict[tuple[int, torch.device], Tensor] = {}  # equal for all parameters that started together
            for parameter in group["params"]:
                if (member := by_parameter.get(id(parameter))) is None:
                    continue
                state = self._state_of(member)
                state["step"] += 1
                if not is_fake(parameter):
                    key = (int(state["step"]), parameter.device)
                    if key not in numbers:
                        numbers[key] = _numbers(key[0], group, factor).to(parameter.device)
                    _update(member, state, numbers[key])
                member.mark_written()
                member.drop_gradient()

    def _state_of(self, member: ActiveParameter) -> dict[str, Any]:
        """The entries that AdamW makes, so that a state saved here loads there and the other way round."""
        master = member.ready_master()
        state: dict[str, Any] = self.base.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(master, requires_grad=False, memory_format=torch.preserve_format)
        elif not is_fake(master):
            state["step"] = state["step"].cpu()  # a fused base keeps it on the device; reading it there would wait
        return state


def _update(member: ActiveParameter, state: dict[str, Any], numbers: Tensor) -> None:
    """Run the pass on one parameter; tensors that are not contiguous go through copies."""
    assert member.gradient is not None
    written = [member.ready_master().detach(), state["exp_avg"], state["exp_avg_sq"]]
    if member.is_copied:
        written.append(member.weight)
    flat = [tensor.view(-1) if tensor.is_contiguous() else tensor.flatten() for tensor in written]
    _compiled()(member.gradient.flatten(), numbers, *flat)
    for tensor, result in zip(written, flat, strict=True):
        if not tensor.is_contiguous():
            tensor.copy_(result.view(tensor.shape))


def _numbers(step: int, group: dict[str, Any], scale: float) -> Tensor:
    """What the pass multiplies by, folded in double precision so that it multiplies little; shape (7,), fp32.

    Factor of the master (1 - lr * weight decay), of the first moment (beta1) and of the gradient in it
    ((1 - beta1) * scale), of the second moment (beta2) and of the squared gradient in it ((1 - beta2) * scale**2),
    step size and eps, the last two with both bias corrections in them.
    """
    beta1, beta2 = (float(beta) for beta in group["betas"])
    lr = float(group["lr"])
    correction1, correction2 = 1 - beta1**step, (1 - beta2**step) ** 0.5
    step_size, eps = lr * correction2 / correction1, group["eps"] * correction2
    decay = 1 - lr * group["weight_decay"]
    return torch.tensor([decay, beta1, (1 - beta1) * scale, beta2, (1 - beta2) * scale**2, step_size, eps])


def adamw_(
    gradient: Tensor,
    numbers: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor | None = None,
) -> None:
    """One AdamW step (Loshchilov and Hutter, arXiv 1711.05101) in place, on flat tensors of one length.

    Args:
        gradient: any floating type; not changed.
        numbers: fp32, shape (7,), see :func:`_numbers`.
        master: fp32; updated.
        exp_avg: fp32 first moment; updated.
        exp_avg_sq: fp32 second moment; updated.
        weight: bf16 or fp16; receives the master, rounded to nearest.
    """
    decay, beta1, rest1, beta2, rest2, step_size, eps = numbers.unbind()
    wide = gradient.float()
    first = exp_avg * beta1 + wide * rest1
    second = exp_avg_sq * beta2 + (wide * rest2) * wide
    updated = master * decay - (step_size * first) / (second.sqrt() + eps)
    exp_avg.copy_(first)
    exp_avg_sq.copy_(second)
    master.copy_(updated)
    if weight is not None:
        weight.copy_(updated)


@functools.cache
def _compiled() -> Callable[..., None]:
    """:func:`adamw_`, compiled once for all lengths; allowed to fuse a multiplication with an addition."""
    from torch._inductor import config

    options: dict[str, Any] = {"cpp.enable_floating_point_contract_flag": "fast"}
    known = isinstance(getattr(config.cpp, "enable_floating_point_contract_flag", None), str)
    return torch.compile(adamw_, dynamic=True, fullgraph=True, options=options if known else None)

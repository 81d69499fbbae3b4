"""AdamW as one compiled pass: reads the model-dtype gradient, writes master, moments and weight.

A base optimizer needs an fp32 gradient beside the 16-bit one, and the write-back reads every master once more. Here
both are part of the update: per entry 14 bytes are read and 14 written for bf16, as many as fused AdamW alone moves
for fp32 parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from badam.errors import InputError
from badam.optim.active_parameter import ActiveParameter
from badam.optim.master_groups import MasterGroups
from badam.tensors.dtensor import local_part
from badam.tensors.functional import clip_factor, gradient_norm, is_fake

_MOST_COMBINATIONS = 6
_combinations: set[tuple[Any, ...]] = set()

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
                f'update="compiled" runs AdamW, but the base optimizer is {type(base).__name__}.',
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
        operands: dict[torch.device, list[Operands]] = {}
        for group in self.base.param_groups:
            for parameter in group["params"]:
                if (member := by_parameter.get(id(parameter))) is None:
                    continue
                state = self._state_of(member)
                state["step"] += 1
                if not is_fake(parameter):
                    numbers = _numbers(int(state["step"]), group, factor)
                    operands.setdefault(parameter.device, []).append(_operands(member, state, numbers))
        for on_device in operands.values():
            _update(on_device)
        for member in members:
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


class Operands(NamedTuple):
    """What the pass reads and writes for one parameter, see :func:`adamw_`."""

    gradient: Tensor
    numbers: tuple[float, ...]
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    weight: Tensor | None  # None where the parameter is its own master

    def flattened(self) -> Operands:
        """The same in one dimension; a copy of what is not contiguous."""
        weight = None if self.weight is None else _flat(self.weight)
        moments = _flat(self.exp_avg), _flat(self.exp_avg_sq)
        return Operands(_flat(self.gradient), self.numbers, _flat(self.master), *moments, weight)


def _operands(member: ActiveParameter, state: dict[str, Any], numbers: tuple[float, ...]) -> Operands:
    assert member.gradient is not None
    weight = local_part(member.weight) if member.is_copied else None
    first, second = local_part(state["exp_avg"]), local_part(state["exp_avg_sq"])
    return Operands(local_part(member.gradient), numbers, local_part(member.ready_master()), first, second, weight)


def _update(operands: Sequence[Operands]) -> None:
    """Run the pass on parameters of one device; tensors that are not contiguous go through copies."""
    flat = [each.flattened() for each in operands]
    numbers = torch.tensor([each.numbers for each in flat], device=flat[0].master.device)
    tensors = [[each.gradient, each.master, each.exp_avg, each.exp_avg_sq, each.weight] for each in flat]
    if _is_worth_compiling(flat):
        _compiled(adamw_on_all_)(tensors, numbers)
    else:
        for index, (gradient, *rest) in enumerate(tensors):
            _compiled(adamw_)(gradient, numbers[index], *rest)
    for each, results in zip(operands, flat, strict=True):
        for name in ("master", "exp_avg", "exp_avg_sq", "weight"):
            tensor, result = getattr(each, name), getattr(results, name)
            if tensor is not None and not tensor.is_contiguous():
                tensor.copy_(result.view(tensor.shape))


def _flat(tensor: Tensor) -> Tensor:
    return tensor.view(-1) if tensor.is_contiguous() else tensor.flatten()


def _is_worth_compiling(operands: Sequence[Operands]) -> bool:
    """Whether these parameters together have a compiled pass, or may have one of the few that there can be.

    One call for all is faster than one for each, because the compiler fuses equal lengths; but it makes a pass for
    every combination of types and equal lengths, and refuses beyond eight.
    """
    lengths = [each.master.numel() for each in operands]
    types = tuple((each.gradient.dtype, each.weight.dtype if each.weight is not None else None) for each in operands)
    combination = (types, tuple(lengths.index(length) + 2 if length > 1 else length for length in lengths))
    if combination not in _combinations and len(_combinations) < _MOST_COMBINATIONS:
        _combinations.add(combination)
    return combination in _combinations


def _numbers(step: int, group: dict[str, Any], scale: float) -> tuple[float, ...]:
    """What the pass multiplies by, folded in double precision so that it multiplies little.

    Factor of the master (1 - lr * weight decay), of the first moment (beta1) and of the gradient in it
    ((1 - beta1) * scale), of the second moment (beta2) and of the squared gradient in it ((1 - beta2) * scale**2),
    step size and eps, the last two with both bias corrections in them.
    """
    beta1, beta2 = (float(beta) for beta in group["betas"])
    lr = float(group["lr"])
    correction1, correction2 = 1 - beta1**step, (1 - beta2**step) ** 0.5
    step_size, eps = lr * correction2 / correction1, group["eps"] * correction2
    decay = 1 - lr * group["weight_decay"]
    return (decay, beta1, (1 - beta1) * scale, beta2, (1 - beta2) * scale**2, step_size, eps)


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


def adamw_on_all_(tensors: Sequence[Sequence[Any]], numbers: Tensor) -> None:
    """:func:`adamw_` on several parameters: their tensors in its order, and their rows of ``numbers``."""
    for index, (gradient, *rest) in enumerate(tensors):
        adamw_(gradient, numbers[index], *rest)


@functools.cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    """``function``, compiled for all lengths; allowed to fuse a multiplication with an addition."""
    from torch._inductor import config

    options: dict[str, Any] = {"cpp.enable_floating_point_contract_flag": "fast"}
    known = isinstance(getattr(config.cpp, "enable_floating_point_contract_flag", None), str)
    return torch.compile(function, dynamic=True, fullgraph=True, options=options if known else None)

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
from badam.tensors.functional import adamw_and_round_, clip_factor, compiled_adamw_factors, gradient_norm, is_fake

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

    def __init__(self, base_optimizer: Optimizer) -> None:
        if type(base_optimizer) is not AdamW:
            raise InputError(
                f'update="compiled" runs AdamW, but the base optimizer is {type(base_optimizer).__name__}.',
                advice='Use torch.optim.AdamW as the base optimizer, or update="base".',
            )
        for group in base_optimizer.param_groups:
            wrong = [option for option in _UNSUPPORTED_OPTIONS if group.get(option)]
            if wrong:
                raise InputError(
                    f'update="compiled" does not know AdamW\'s option {wrong[0]}.', advice='Use update="base".'
                )
        super().__init__(base_optimizer)
        self._clip_factor: Tensor | None = None

    def clip(self, gradients: Sequence[Tensor], max_norm: float, norm_type: float) -> Tensor:
        """Leave the scaling to the next step, which multiplies in passing; here it would round in the model's type."""
        norm = gradient_norm(gradients, norm_type)
        if self._clip_factor is not None:
            norm = norm * self._clip_factor
        factor = clip_factor(norm, max_norm)
        self._clip_factor = factor if self._clip_factor is None else self._clip_factor * factor
        return norm

    def unclip(self) -> None:
        """Forget the factor that :meth:`clip` has left."""
        self._clip_factor = None

    def step(self, members: Sequence[ActiveParameter]) -> None:
        """One AdamW step from the gradients of ``members``; they are released, the weights written."""
        gradient_scale = 1.0
        if self._clip_factor is not None and not is_fake(self._clip_factor):
            gradient_scale = float(self._clip_factor)
        self.unclip()
        by_parameter = {id(member.parameter): member for member in members}
        operands: dict[torch.device, list[Operands]] = {}
        for group in self.base_optimizer.param_groups:
            for parameter in group["params"]:
                if (member := by_parameter.get(id(parameter))) is None:
                    continue
                state = self._state_of(member)
                state["step"] += 1
                if not is_fake(parameter):
                    factors = compiled_adamw_factors(
                        step=int(state["step"]),
                        lr=float(group["lr"]),
                        betas=(float(group["betas"][0]), float(group["betas"][1])),
                        eps=group["eps"],
                        weight_decay=group["weight_decay"],
                        gradient_scale=gradient_scale,
                    )
                    operands.setdefault(parameter.device, []).append(_operands(member, state, factors))
        for operands_of_device in operands.values():
            _update(operands_of_device)
        for member in members:
            member.mark_written()
            member.drop_gradient()

    def _state_of(self, member: ActiveParameter) -> dict[str, Any]:
        """The entries that AdamW makes, so that a state saved here loads there and the other way round."""
        master = member.ready_master()
        state: dict[str, Any] = self.base_optimizer.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(master, requires_grad=False, memory_format=torch.preserve_format)
        elif not is_fake(master):
            state["step"] = state["step"].cpu()  # a fused base keeps it on the device; reading it there would wait
        return state


class Operands(NamedTuple):
    """What the pass reads and writes for one parameter, see :func:`badam.tensors.functional.adamw_and_round_`."""

    gradient: Tensor
    factors: tuple[float, ...]
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    weight: Tensor | None  # None where the parameter is its own master

    def flattened(self) -> Operands:
        """The same in one dimension; a copy of what is not contiguous."""
        return self._replace(
            gradient=_flat(self.gradient),
            master=_flat(self.master),
            exp_avg=_flat(self.exp_avg),
            exp_avg_sq=_flat(self.exp_avg_sq),
            weight=None if self.weight is None else _flat(self.weight),
        )


def _operands(member: ActiveParameter, state: dict[str, Any], factors: tuple[float, ...]) -> Operands:
    assert member.gradient is not None
    return Operands(
        gradient=local_part(member.gradient),
        factors=factors,
        master=local_part(member.ready_master()),
        exp_avg=local_part(state["exp_avg"]),
        exp_avg_sq=local_part(state["exp_avg_sq"]),
        weight=local_part(member.weight) if member.is_copied else None,
    )


def _update(operands: Sequence[Operands]) -> None:
    """Run the pass on parameters of one device; tensors that are not contiguous go through copies."""
    flat = [operand.flattened() for operand in operands]
    factors = torch.tensor([operand.factors for operand in flat], device=flat[0].master.device)
    tensors = [
        [operand.gradient, operand.master, operand.exp_avg, operand.exp_avg_sq, operand.weight] for operand in flat
    ]
    if _is_worth_compiling(flat):
        _compiled(adamw_and_round_all_)(tensors, factors)
    else:
        for index, (gradient, *updated) in enumerate(tensors):
            _compiled(adamw_and_round_)(gradient, factors[index], *updated)
    for operand, results in zip(operands, flat, strict=True):
        for name in ("master", "exp_avg", "exp_avg_sq", "weight"):
            tensor, result = getattr(operand, name), getattr(results, name)
            if tensor is not None and not tensor.is_contiguous():
                tensor.copy_(result.view(tensor.shape))


def _flat(tensor: Tensor) -> Tensor:
    return tensor.view(-1) if tensor.is_contiguous() else tensor.flatten()


def _is_worth_compiling(operands: Sequence[Operands]) -> bool:
    """Whether these parameters together have a compiled pass, or may have one of the few that there can be.

    One call for all is faster than one for each, because the compiler fuses equal lengths; but it makes a pass for
    every combination of types and equal lengths, and refuses beyond eight.
    """
    lengths = [operand.master.numel() for operand in operands]
    types = tuple(
        (operand.gradient.dtype, operand.weight.dtype if operand.weight is not None else None) for operand in operands
    )
    combination = (types, tuple(lengths.index(length) + 2 if length > 1 else length for length in lengths))
    if combination not in _combinations and len(_combinations) < _MOST_COMBINATIONS:
        _combinations.add(combination)
    return combination in _combinations


def adamw_and_round_all_(tensors: Sequence[Sequence[Any]], factors: Tensor) -> None:
    """:func:`adamw_and_round_` on several parameters: their tensors in its order, and their rows of ``factors``."""
    for index, (gradient, *updated) in enumerate(tensors):
        adamw_and_round_(gradient, factors[index], *updated)


@functools.cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    """``function``, compiled for all lengths; allowed to fuse a multiplication with an addition."""
    from torch._inductor import config

    options: dict[str, Any] = {"cpp.enable_floating_point_contract_flag": "fast"}
    known = isinstance(getattr(config.cpp, "enable_floating_point_contract_flag", None), str)
    return torch.compile(function, dynamic=True, fullgraph=True, options=options if known else None)

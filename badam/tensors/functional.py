"""Rounding, checking, clipping and updating as free functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from badam.tensors.dtensor import is_sharded, local_part, norm_over_shards

ROUNDING_CHUNK = 2**20
"""Entries that stochastic rounding handles at a time: its temporaries are 6 MiB (bf16) or 16 MiB (fp16), whatever the
size of the tensor. The same on every device, so that a rehearsal on fake CPU tensors allocates what a GPU will."""

_FP16_LEAST_EXPONENT = -13  # of frexp, for the least normal number 2**-14 = 0.5 * 2**-13
_FP16_SIGNIFICAND_BITS = 11  # the leading one included


def is_fake(tensor: Tensor) -> bool:
    """Whether ``tensor`` has a shape but no data, so that nothing may depend on its values."""
    return isinstance(tensor, FakeTensor)


def copy_nearest_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Write each fp32 source into its 16-bit target, rounded to nearest; no temporaries."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def round_stochastically_(target: Tensor, source: Tensor, generator: torch.Generator) -> None:
    """Write fp32 ``source`` into 16-bit ``target`` so that its expected value is ``source``.

    Each entry becomes one of the two numbers of the target's type around it, the nearer one more often: the
    probability of each is one minus its relative distance. Entries that the type can hold stay what they are, and so
    do infinities and NaN.

    Args:
        target: bf16 or fp16, any shape; written in place.
        source: fp32, the same shape and device; not changed.
        generator: of the same device; advanced.

    Not counted: a copy of the target where it is not contiguous.
    """
    if not target.is_contiguous():
        dense = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        round_stochastically_(dense, source, generator)
        target.copy_(dense)
        return
    flat_target, flat_source = target.view(-1), source.contiguous().view(-1)
    round_chunk = _round_to_bfloat16 if target.dtype == torch.bfloat16 else _round_to_float16
    starts = range(0, flat_target.numel(), ROUNDING_CHUNK)
    if is_fake(target):  # every full chunk allocates the same: the first and the last tell all
        starts = starts[:: max(len(starts) - 1, 1)]
    for start in starts:
        piece = slice(start, start + ROUNDING_CHUNK)
        round_chunk(flat_target[piece], flat_source[piece], generator)


def _round_to_bfloat16(target: Tensor, source: Tensor, generator: torch.Generator) -> None:
    """A bf16 number is the upper half of an fp32 one: add 16 random bits to the lower half and cut it off.

    One 64-bit draw serves four entries, because drawing costs more than everything else here.
    """
    draws = torch.empty((source.numel() + 3) // 4, dtype=torch.int64, device=source.device)
    draws.random_(-(2**63), None, generator=generator)
    bits = draws.view(torch.int16)[: source.numel()].to(torch.int32)
    bits.bitwise_and_(0xFFFF).add_(source.view(torch.int32)).bitwise_right_shift_(16)
    target.view(torch.int16).copy_(bits)


def _round_to_float16(target: Tensor, source: Tensor, generator: torch.Generator) -> None:
    """Count in units of the last place at each entry (constant below the least normal number), add [0, 1), floor."""
    exponent = torch.frexp(source).exponent.clamp_(min=_FP16_LEAST_EXPONENT).sub_(_FP16_SIGNIFICAND_BITS)
    units = torch.ldexp(source, -exponent)
    units.add_(torch.rand(source.shape, device=source.device, generator=generator)).floor_()
    target.copy_(torch.ldexp(units, exponent))


def non_finite_flags(tensors: Iterable[Tensor]) -> list[Tensor]:
    """One flag per device and dtype among ``tensors``, shape (1,), positive if an entry is infinite or NaN.

    Reads each tensor once and allocates nothing of its size; nothing waits for the device here.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    flags = []
    for (device, _), members in groups.items():
        flag = torch.zeros(1, dtype=torch.float32, device=device)
        # Multiplies by one in passing, which changes no bit; the alternatives need a temporary or are slower.
        torch._amp_foreach_non_finite_check_and_unscale_(members, flag, torch.ones_like(flag))
        flags.append(flag)
    return flags


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every entry of ``tensors`` is finite; True for fake tensors, after the same allocations."""
    flags = non_finite_flags(tensors)
    return any(is_fake(flag) for flag in flags) or not any(flag.item() for flag in flags)


def gradient_norm(gradients: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """The norm of all ``gradients`` as one vector, computed in fp32 whatever their type; shape (), fp32.

    Sharded gradients count whole: the same number on every process, which all of them must ask for.
    """
    if not gradients:
        return torch.zeros(())
    values = [gradient.coalesce().values() if gradient.is_sparse else local_part(gradient) for gradient in gradients]
    # A process may hold no entry of a small tensor; the largest of no entries is not defined.
    values = [value if value.numel() else value.new_zeros(1) for value in values]
    norms = torch._foreach_norm(values, norm_type, dtype=torch.float32)
    return norm_over_shards(norms, gradients, norm_type)


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What to multiply gradients of this ``norm`` by so that it is at most ``max_norm``; shape (), at most 1."""
    factor: Tensor = max_norm / (norm + 1e-6)
    return factor.clamp(max=1.0)


def clip_gradients_(gradients: Sequence[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale ``gradients`` in place to a joint norm of at most ``max_norm``; returns the norm before, shape (), fp32."""
    norm = gradient_norm(gradients, norm_type)
    factor = clip_factor(norm, max_norm)
    for gradient in gradients:
        (local_part(gradient) if is_sharded(gradient) else gradient).mul_(factor.to(gradient.device))
    return norm


def is_rounding_of(weights: Tensor, masters: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``weights`` equal ``masters`` within one unit in the last place of ``dtype``.

    Args:
        weights: fp32 or wider, the values of weights that are kept in ``dtype``.
        masters: of the same shape and type.
        dtype: 16 bits or wider.
    """
    kind = torch.finfo(dtype)
    return torch.allclose(weights, masters, rtol=kind.eps, atol=kind.smallest_normal * kind.eps)


def adamw_(
    masters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
    maximize: bool = False,
    fused: bool = True,
    found_inf: Tensor | None = None,
) -> None:
    """One AdamW step (arXiv 1711.05101, decoupled decay) on lists of fp32 tensors of one device, all in place.

    Args:
        masters: parameters.
        gradients: of the same shapes; not changed.
        exp_avgs: first moments.
        exp_avg_sqs: second moments.
        step: number of this step, from 1.
        lr: learning rate.
        betas: decay of the moments.
        eps: added to the root of the second moment.
        weight_decay: decay per unit of learning rate.
        maximize: climb instead of descend.
        fused: one pass in torch's fused kernel, without temporaries; otherwise one temporary of the masters' size.
        found_inf: shape (1,); where positive, the fused kernel changes nothing, and nobody waits for the device.
    """
    if not masters:
        return
    if fused:
        steps = [torch.full((), float(step), device=masters[0].device)] * len(masters)
        torch._fused_adamw_(
            list(masters),
            list(gradients),
            list(exp_avgs),
            list(exp_avg_sqs),
            [],
            steps,
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=maximize,
            found_inf=found_inf,
        )
        return
    lr = float(lr)
    gradients = torch._foreach_neg(list(gradients)) if maximize else list(gradients)
    torch._foreach_mul_(list(masters), 1 - lr * weight_decay)
    torch._foreach_lerp_(list(exp_avgs), gradients, 1 - betas[0])
    torch._foreach_mul_(list(exp_avg_sqs), betas[1])
    torch._foreach_addcmul_(list(exp_avg_sqs), gradients, gradients, 1 - betas[1])
    roots = torch._foreach_sqrt(list(exp_avg_sqs))
    torch._foreach_div_(roots, math.sqrt(1 - betas[1] ** step))
    torch._foreach_add_(roots, eps)
    torch._foreach_addcdiv_(list(masters), list(exp_avgs), roots, -lr / (1 - betas[0] ** step))


def compiled_adamw_factors(
    *, step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, gradient_scale: float
) -> tuple[float, ...]:
    """What :func:`adamw_and_round_` multiplies by, folded in double precision so that it multiplies little.

    Args:
        step: number of this step, from 1.
        lr: learning rate.
        betas: decay of the moments.
        eps: added to the root of the second moment.
        weight_decay: decay per unit of learning rate.
        gradient_scale: factor of the gradient, from clipping.

    Returns:
        Factor of the master (1 - lr * weight decay); of the first moment (beta1) and of the gradient in it ((1 - beta1)
        * scale); of the second moment (beta2) and of the squared gradient in it ((1 - beta2) * scale**2); step size and
        eps, the last two with both bias corrections in them.
    """
    beta1, beta2 = betas
    bias_correction1, bias_correction2_root = 1 - beta1**step, (1 - beta2**step) ** 0.5
    return (
        1 - lr * weight_decay,
        beta1,
        (1 - beta1) * gradient_scale,
        beta2,
        (1 - beta2) * gradient_scale**2,
        lr * bias_correction2_root / bias_correction1,
        eps * bias_correction2_root,
    )


def adamw_and_round_(
    gradient: Tensor,
    factors: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor | None = None,
) -> None:
    """One AdamW step (arXiv 1711.05101) and the write-back in place, on flat tensors of one length; to be compiled.

    Args:
        gradient: any floating type; not changed.
        factors: fp32, shape (7,), see :func:`compiled_adamw_factors`.
        master: fp32; updated.
        exp_avg: fp32 first moment; updated.
        exp_avg_sq: fp32 second moment; updated.
        weight: bf16 or fp16; receives the master, rounded to nearest.
    """
    decay, beta1, gradient_factor, beta2, squared_gradient_factor, step_size, eps = factors.unbind()
    gradient_fp32 = gradient.float()
    new_exp_avg = exp_avg * beta1 + gradient_fp32 * gradient_factor
    new_exp_avg_sq = exp_avg_sq * beta2 + (gradient_fp32 * squared_gradient_factor) * gradient_fp32
    new_master = master * decay - (step_size * new_exp_avg) / (new_exp_avg_sq.sqrt() + eps)
    exp_avg.copy_(new_exp_avg)
    exp_avg_sq.copy_(new_exp_avg_sq)
    master.copy_(new_master)
    if weight is not None:
        weight.copy_(new_master)

"""AdamW over many windows at once: those that share options, device and step number go into one call."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from badam.optim.window import Window
from badam.optim.window_entries import adamw_


def update_windows(
    windows: Sequence[Window],
    gradients: Sequence[Tensor],
    groups: Sequence[dict[str, Any]],
    state: MutableMapping[Tensor, dict[str, Any]],
    *,
    fused: bool,
    found_inf: Tensor | None = None,
) -> None:
    """One AdamW step on the masters of ``windows``, with the options of each window's group.

    Args:
        windows: to update.
        gradients: of their masters, in the same order.
        groups: the optimizer's parameter groups.
        state: step number and moments by master; made here at a window's first step.
        fused: use torch's fused kernel.
        found_inf: shape (1,), on the only device; where positive, nothing but the step number changes.
    """
    alike: dict[tuple[int, torch.device, int], tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]] = {}
    for window, gradient in zip(windows, gradients, strict=True):
        own = state[window.master]
        if not own:
            own["step"] = 0
            own["exp_avg"] = torch.zeros_like(window.master, requires_grad=False)
            own["exp_avg_sq"] = torch.zeros_like(window.master, requires_grad=False)
        own["step"] += 1
        lists = alike.setdefault((window.group, gradient.device, own["step"]), ([], [], [], []))
        for members, tensor in zip(lists, (window.master, gradient, own["exp_avg"], own["exp_avg_sq"]), strict=True):
            members.append(tensor)
    for (index, _, step), lists in alike.items():
        group = groups[index]
        adamw_(
            *lists,
            step=step,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group.get("maximize", False),
            fused=fused,
            found_inf=found_inf,
        )

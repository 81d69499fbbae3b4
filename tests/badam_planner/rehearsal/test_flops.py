"""Attention's operations, against the same attention written as single products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from badam_planner.rehearsal.flops import FLOPS

KERNELS = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
HEADS, GROUPS = 8, 2


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    repeated = (each.repeat_interleave(HEADS // GROUPS, dim=1) for each in (key, value))
    keys, values = repeated
    return (query @ keys.transpose(2, 3)).softmax(-1) @ values


@pytest.fixture
def tensors() -> tuple[Tensor, Tensor, Tensor]:
    query = torch.empty(2, HEADS, 16, 32, device="meta", requires_grad=True)
    key = torch.empty(2, GROUPS, 24, 32, device="meta", requires_grad=True)
    value = torch.empty(2, GROUPS, 24, 48, device="meta", requires_grad=True)
    return query, key, value


@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_with_grouped_heads_counts_the_products_of_every_query_head(
    kernel: str, tensors: tuple[Tensor, Tensor, Tensor]
) -> None:
    with FlopCounterMode(display=False) as forward:
        result = attention(*tensors)
    with FlopCounterMode(display=False) as backward:
        result.sum().backward()
    scores = forward.get_total_flops() * 32 // (32 + 48)
    operator = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}")
    assert FLOPS[operator](*tensors, out_val=result) == forward.get_total_flops()
    again = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_backward")
    assert FLOPS[again](result, *tensors, out_val=None) == backward.get_total_flops() + scores  # which it makes again

"""The rule for products of experts against the CPU's kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from badam.vocabulary import Dtype
from badam_planner.rehearsal.evaluator import Evaluator
from badam_planner.rehearsal.grouped_product import grouped_product, needs_a_rule
from tests.badam_planner.rehearsal.measuring import measure
from tests.badam_planner.rehearsal.plans import QWEN3_MOE, plan_of

SHAPES = {
    "tokens by experts": ((8, 16), (2, 16, 24)),
    "experts by tokens": ((2, 16, 24), (24, 8)),
    "both by tokens": ((16, 8), (8, 24)),
    "one matrix each": ((2, 16, 8), (2, 8, 24)),
}


def factors(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    first, second = SHAPES[name]
    offsets = None if name == "one matrix each" else torch.tensor([3, 8], dtype=torch.int32)
    return torch.ones(first, dtype=dtype), torch.ones(second, dtype=dtype), offsets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", SHAPES)
def test_the_output_is_laid_out_as_the_kernels(name: str, dtype: torch.dtype) -> None:
    first, second, offsets = factors(name, dtype)
    real = torch._grouped_mm(first, second, offsets)
    assert needs_a_rule(first)
    with FakeTensorMode() as mode:
        fake = grouped_product(*(None if each is None else mode.from_tensor(each) for each in (first, second, offsets)))
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_strides_that_the_kernel_refuses_are_refused() -> None:
    first, second = torch.ones(8, 18), torch.ones(2, 18, 24)
    offsets = torch.tensor([3, 8], dtype=torch.int32)
    for product in (torch._grouped_mm, grouped_product):
        with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
            product(first, second, offsets)


def test_torchs_own_rule_is_used_where_there_is_one() -> None:
    assert not needs_a_rule(torch.ones(1, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["saved", "recomputed"])
def test_a_mixture_of_experts_is_planned_to_the_byte_in_other_types(dtype: Dtype, checkpointing: bool) -> None:
    plan, tree = plan_of(QWEN3_MOE, 3, dtype=dtype, checkpointing=checkpointing)
    predicted = Evaluator(tree).peaks(plan, 0).peak_allocated_bytes
    assert predicted == measure(plan).peak_bytes

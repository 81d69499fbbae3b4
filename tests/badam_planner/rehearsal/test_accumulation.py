"""Which sums of gradients the rehearsal makes in place, against the allocator's reports of the same graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from badam import phases
from badam.profiling.memory.cpu_allocator_log import AllocatorLog
from badam.vocabulary import Phase
from badam_planner.recording.timeline import Timeline
from badam_planner.rehearsal.tracker import StorageTracker

WIDTH = 64
Graph = Callable[[], tuple[list[Tensor], list[Tensor]]]


def three_branches() -> tuple[list[Tensor], list[Tensor]]:
    shared = torch.zeros(4, WIDTH, requires_grad=True) * 1
    return [shared @ torch.zeros(WIDTH, WIDTH) for _ in range(3)], [torch.ones(4, WIDTH) for _ in range(3)]


def residual() -> tuple[list[Tensor], list[Tensor]]:
    shared = torch.zeros(4, WIDTH, requires_grad=True) * 1
    return [(shared + shared @ torch.zeros(WIDTH, WIDTH)) * 2], [torch.ones(4, WIDTH)]


def tied(grad_dtype: torch.dtype | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """The first summand is a view, which is not written over; converted to another type it is not one any more."""
    weight = torch.zeros(128, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    if grad_dtype is not None:
        weight.grad_dtype = grad_dtype  # type: ignore[attr-defined]  # unknown to torch's type stubs
    hidden = functional.embedding(torch.zeros(4, dtype=torch.int64), weight) * 1
    out = functional.linear(hidden, weight)
    return [out], [torch.ones_like(out)]


def tied_in_fp32() -> tuple[list[Tensor], list[Tensor]]:
    return tied(torch.float32)


def reported_births(graph: Graph, nbytes: int) -> int:
    """Blocks of ``nbytes`` that the allocator reports in backward."""
    tensors, gradients = graph()
    log = AllocatorLog()
    log.start()
    torch.autograd.backward(tensors, gradients)
    return sum(change == nbytes for _, change in log.stop())


def rehearsed_births(graph: Graph, nbytes: int) -> int:
    with FakeTensorMode():
        tensors, gradients = graph()
        tracker = StorageTracker(nn.Linear(1, 1))
        phases.enter(Phase.SETUP)
        with tracker.watching():
            phases.enter(Phase.BACKWARD)
            torch.autograd.backward(tensors, gradients)
            phases.enter(Phase.SETUP)
    views = "aten.t."  # of weights, which existed before
    made = [one for one in tracker.recording.allocations if not one.operation.startswith(views)]
    return sum(one.nbytes == nbytes for one in made)


@pytest.mark.parametrize(
    ("graph", "nbytes", "births"),
    [
        (three_branches, 4 * WIDTH * 4, 4),  # the gradients of the branches, and what their sum is multiplied to
        (residual, 4 * WIDTH * 4, 3),
        (tied, 128 * WIDTH * 2, 3),  # and here their sum
        (tied_in_fp32, 128 * WIDTH * 4, 2),
    ],
)
def test_as_many_tensors_are_born_in_backward_as_with_real_ones(graph: Graph, nbytes: int, births: int) -> None:
    assert rehearsed_births(graph, nbytes) == reported_births(graph, nbytes) == births


def test_an_addition_in_forward_is_none_of_the_engines_sums() -> None:
    with FakeTensorMode():
        tracker = StorageTracker(nn.Linear(1, 1))
        with tracker.watching():
            one, other = torch.zeros(256), torch.zeros(256)
            kept = one + other
            assert kept is not one
    assert Timeline(tracker.recording).peak().nbytes == 3 * 1024

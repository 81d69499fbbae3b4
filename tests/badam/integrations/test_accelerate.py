"""The clipping function that hosts bind to their accelerator."""

from __future__ import annotations

from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from badam import clip_grad_norm_old_version
from badam.optim.active_parameter import HAS_GRAD_DTYPE
from badam.optim.base import hides_gradients, innermost_optimizer
from tests.badam.optim.tiny_net import blocks, loss_of, net


class Host:
    """What the function uses of an accelerator."""

    def __init__(self, *optimizers: Any, kind: str = "NO", models: tuple[Any, ...] = ()) -> None:
        self.distributed_type = kind
        self._optimizers = [SimpleNamespace(optimizer=optimizer) for optimizer in optimizers]
        self._models = models
        self.unscaled = 0
        self.clip_grad_norm_ = MethodType(clip_grad_norm_old_version, self)

    def unscale_gradients(self) -> None:
        self.unscaled += 1


@pytest.mark.skipif(not HAS_GRAD_DTYPE, reason="this torch cannot keep an fp32 gradient where torch clips")
def test_it_clips_visible_gradients_with_a_norm_in_fp32() -> None:
    model, twin = net(), net()
    optimizer, _ = blocks(model, switch_block_every=0), blocks(twin, switch_block_every=0)
    for each in (model, twin):
        (loss_of(each, 0) * 100).backward()
    host = Host(optimizer)
    norm = host.clip_grad_norm_(model.parameters(), 0.5)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(float(torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)), rel=1e-6)
    assert host.unscaled == 1
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, twin.get_parameter(name).grad)


def test_it_clips_gradients_that_the_optimizer_keeps_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("badam.optim.compiled_adamw._compiled", lambda function: function)
    model, twin = net(), net()
    optimizer, reference = blocks(model, update="compiled"), blocks(twin)
    for each in (model, twin):
        (loss_of(each, 0) * 100).backward()
    norm = Host(optimizer).clip_grad_norm_(model.parameters(), 0.5)
    expected = Host(reference).clip_grad_norm_(twin.parameters(), 0.5)
    assert float(norm) == pytest.approx(float(expected), rel=1e-6)
    assert float(optimizer.clip_grad_norm_(9.0)) == pytest.approx(0.5, rel=1e-4)


def test_it_takes_any_norm_and_a_single_tensor() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([3.0, -8.0, 1.0])
    assert float(Host().clip_grad_norm_(parameter, 4.0, norm_type=float("inf"))) == 8.0
    torch.testing.assert_close(parameter.grad, torch.tensor([1.5, -4.0, 0.5]))


def test_it_clips_sparse_gradients() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    (table(torch.tensor([1, 1, 3])).sum() * 10).backward()
    norm = Host().clip_grad_norm_(table.parameters(), 1.0)
    assert float(norm) == pytest.approx((2 * 20**2 + 2 * 10**2) ** 0.5)
    assert float(table.weight.grad.to_dense().norm()) == pytest.approx(1.0, rel=1e-4)


def test_deepspeed_clips_by_itself_and_reports_its_norm() -> None:
    host = Host(kind="DEEPSPEED")
    assert host.clip_grad_norm_([], 1.0) is None
    host.deepspeed_engine_wrapped = SimpleNamespace(get_global_grad_norm=lambda: torch.tensor(2.5))
    assert float(host.clip_grad_norm_([], 1.0)) == 2.5


def test_a_sharded_model_clips_by_itself() -> None:
    model = net()
    model.clip_grad_norm_ = lambda limit, order: torch.tensor(limit + order)
    host = Host(kind="FSDP", models=(model,))
    assert float(host.clip_grad_norm_(model.parameters(), 1.0)) == 3.0


def test_optimizers_are_found_inside_their_wrappers() -> None:
    optimizer = blocks(net())
    wrapped = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))
    assert innermost_optimizer(wrapped) is optimizer
    assert innermost_optimizer(None) is None
    assert hides_gradients(optimizer) != HAS_GRAD_DTYPE
    assert not hides_gradients(torch.optim.SGD([nn.Parameter(torch.zeros(1))]))

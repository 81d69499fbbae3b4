"""What engines tell the library underneath, without processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from badam.training.engines import Sharded
from badam.training.methods import method_of
from tests.badam.training.tiny import tiny_plan


class Told:
    """Stands in for a sharded model."""

    def __init__(self) -> None:
        self.averages: list[bool] = []

    def set_requires_all_reduce(self, requires: bool) -> None:
        self.averages.append(requires)


@pytest.mark.parametrize(("shard_size", "expected"), [(2, [False, False, True]), (None, [])])
def test_several_copies_average_gradients_in_the_last_micro_batch_alone(shard_size: Any, expected: list[bool]) -> None:
    plan = tiny_plan()
    target = plan.target.model_copy(update={"engine": "fsdp2", "num_gpus": 4, "shard_size": shard_size})
    engine, model, weight = Sharded(plan.model_copy(update={"target": target})), Told(), torch.ones(2).requires_grad_()
    engine.place = lambda model: setattr(engine, "_model", model)  # type: ignore[method-assign]
    engine.place(model)  # type: ignore[arg-type]
    for is_last in (False, False, True):
        engine.backward((2 * weight).sum(), method_of("badam"), torch.optim.SGD([weight]), is_last=is_last)
    assert model.averages == expected
    assert weight.grad is not None
    assert weight.grad.tolist() == [6.0, 6.0]

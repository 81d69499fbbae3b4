"""Operators answered from memory: what comes back is what torch would have made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from badam_planner.rehearsal import fake_ops as shapes
from badam_planner.rehearsal.fake_ops import Maker, answer

aten = torch.ops.aten


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    monkeypatch.setattr(shapes, "_KNOWN", {})
    return FakeTensorMode()


def of_torch_and_of_memory(
    mode: FakeTensorMode, func: Any, inputs: Callable[[], tuple[Any, ...]]
) -> tuple[Any, Any, Tensor]:
    """What torch answers, what memory answers after that, and the second call's first input."""
    maker = Maker(mode)
    with mode:
        answer(maker, func, inputs(), {})
        known = inputs()
        asked = func(*inputs())
    remembered, _ = answer(maker, func, known, {})
    return asked, remembered, known[0]


def test_a_remembered_tensor_has_every_attribute_that_torch_gives_its_own(mode: FakeTensorMode) -> None:
    def inputs() -> tuple[Any, ...]:
        return torch.empty(3, 4, dtype=torch.bfloat16), torch.empty(4, 5, dtype=torch.bfloat16)

    maker = Maker(mode)
    with mode:
        asked = aten.mm.default(*inputs())
        for _ in range(3):  # the first is learned, the second made by torch's constructor, the third copied from it
            remembered, _moved = answer(maker, aten.mm.default, inputs(), {})
    assert type(remembered) is FakeTensor
    assert vars(remembered) == vars(asked)
    assert (remembered.shape, remembered.dtype, remembered.device) == (asked.shape, asked.dtype, asked.device)
    assert remembered.untyped_storage().nbytes() == asked.untyped_storage().nbytes()
    with mode, pytest.raises(RuntimeError):
        remembered.data_ptr()


def test_what_torch_does_not_declare_as_a_view_is_one_all_the_same(mode: FakeTensorMode) -> None:
    def inputs() -> tuple[Any, ...]:
        return torch.empty(6, 4), [2, 3, 4]

    func = aten._unsafe_view.default
    _, remembered, source = of_torch_and_of_memory(mode, func, inputs)
    assert remembered.shape == (2, 3, 4)
    assert remembered.untyped_storage()._cdata == source.untyped_storage()._cdata
    assert len(shapes._KNOWN) == 1
    assert answer(Maker(mode), func, (source, [2, 3, 4]), {})[1] == 0  # nothing moves


def test_the_generator_of_random_numbers_makes_no_difference(mode: FakeTensorMode) -> None:
    maker = Maker(mode)
    with mode:
        for _ in range(2):
            target = torch.empty(5, dtype=torch.int64)
            options = {"generator": torch.Generator()}
            assert answer(maker, aten.random_.default, (target,), options)[0] is target
    assert len(shapes._KNOWN) == 1


def test_a_tensor_to_write_to_comes_back_itself(mode: FakeTensorMode) -> None:
    maker = Maker(mode)
    with mode:
        for _ in range(2):
            target = torch.empty(3, 4)
            given = (torch.empty(3, 1), torch.empty(1, 4))
            assert answer(maker, aten.mul.out, given, {"out": target})[0] is target

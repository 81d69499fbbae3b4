"""What is asked of a card, asked of the CPU with a meter that plays a card's memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from badam.errors import InputError
from benchmarks.gpu import assumptions
from benchmarks.gpu.meter import account

DEVICE = torch.device("cpu")


class PlayedMeter:
    """Answers from lists, in order; a list that is used up goes on with its last number."""

    nvml_source = "played"

    def __init__(self, *, allocated: tuple[int, ...] = (0,), peak: int = 0, reserved: tuple[int, ...] = (0,)) -> None:
        self._allocated, self._reserved = iter(allocated), iter(reserved)
        self._last = {"allocated": 0, "reserved": 0}
        self._peak = peak
        self.settled = 0

    def _next(self, name: str, numbers: Iterator[int]) -> int:
        self._last[name] = next(numbers, self._last[name])
        return self._last[name]

    def allocated(self) -> int:
        return self._next("allocated", self._allocated)

    def peak(self) -> int:
        return self._peak

    def reserved(self) -> int:
        return self._next("reserved", self._reserved)

    def used(self) -> int:
        return 700

    def nvml(self) -> int | None:
        return None

    def reset_peak(self) -> None:
        pass

    def settle(self) -> None:
        self.settled += 1


def test_without_a_card_there_is_nothing_to_ask() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(InputError, match="no CUDA device"):
        assumptions.measure_assumptions("test")


def test_reserved_bytes_of_a_request_are_what_it_adds() -> None:
    steps = [number for request in range(len(assumptions.REQUESTS)) for number in (100, 100 + request)]
    found = assumptions.segment_bytes(PlayedMeter(reserved=tuple(steps)), DEVICE)
    assert list(found.values()) == list(range(len(assumptions.REQUESTS)))


def test_a_workspace_is_what_an_operation_leaves_allocated() -> None:
    stages: list[str] = []
    found = assumptions.workspace_bytes(
        PlayedMeter(allocated=(0, 32, 32, 32, 32, 32, 32, 64, 64)), DEVICE, stages.append
    )
    assert found["product"] == 32
    assert found["product in backward"] == 32
    assert found["product with bias"] == found["product in fp32"] == found["batched product"] == 0
    assert stages == list(found)


def test_scratch_is_what_the_peak_has_beyond_inputs_and_results() -> None:
    # Before 1000, after 1300: results of 300; the peak of 1500 leaves 200 of scratch.
    meter = PlayedMeter(allocated=(1000, 1300, 1300, 1400), peak=1500)
    ahead, back, *_ = assumptions.attention_scratch(meter, DEVICE, ((1, 2, 2, 16, 8),))
    assert (ahead.scratch_bytes, ahead.result_bytes) == (200, 300)
    assert (back.scratch_bytes, back.result_bytes) == (100, 100)
    assert back.kernel.startswith("ScaledDotProduct")
    assert back.assumed_bytes == 2 * 128 * (32 + 1) * 4


def test_kernels_that_do_not_take_the_inputs_are_left_out() -> None:
    found = list(assumptions.attention_scratch(PlayedMeter(), DEVICE, ((1, 4, 2, 16, 8),)))
    assert {scratch.operation for scratch in found} >= {"attention forward, default", "attention backward, default"}
    assert not any("cudnn" in scratch.operation for scratch in found)


def test_embedding_loss_and_step_are_asked_too() -> None:
    found = list(assumptions.other_scratch(PlayedMeter(peak=7), DEVICE, vocabulary=16, hidden=8, tokens=4))
    assert [scratch.operation for scratch in found] == [
        "embedding backward",
        "loss forward",
        "loss backward",
        "fused AdamW",
        "clipping",
    ]
    assert {scratch.scratch_bytes for scratch in found} == {7}


def test_the_context_is_what_is_used_beyond_what_the_allocator_holds() -> None:
    assert account(PlayedMeter(allocated=(10,), reserved=(200,))).context_bytes == 500

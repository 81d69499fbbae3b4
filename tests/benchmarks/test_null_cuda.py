"""What the null device's tools make of an allocator's trace; no device is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from badam.errors import InputError
from badam.vocabulary import Phase
from benchmarks import card
from benchmarks.gpu.cases import CASES
from benchmarks.null_cuda import device
from benchmarks.null_cuda.compare import Step, differences_in_order
from benchmarks.null_cuda.gpus import find_gpu, variables_of
from benchmarks.null_cuda.history import operator, requests_of, simulate
from benchmarks.null_cuda.records import TRACES

MIB = 2**20


def event(action: str, address: int, size: int, mark: str = "", stream: int = 0) -> dict[str, Any]:
    return {"action": action, "addr": address, "size": size, "stream": stream, "user_metadata": mark, "frames": []}


def test_requests_carry_step_block_and_phase_also_where_autograds_thread_made_them() -> None:
    events = [
        event("alloc", 1, 100),
        event("alloc", 2, 200, "main|0|layer.3|forward"),
        event("alloc", 3, 300, "other|recompute"),
        event("alloc", 4, 400, "other|backward"),
        event("free_requested", 2, 200),
        event("free_completed", 2, 200),
        event("free_completed", 99, 1),  # taken before the record began
        event("alloc", 5, 500, "main|0|layer.3|step"),
        event("segment_free", 1000, 2 * MIB),
        event("segment_free", 2000, 2 * MIB),
    ]
    requests = list(requests_of(events))
    assert [(r.action, r.number, r.nbytes, r.step, r.block, r.phase) for r in requests] == [
        ("take", 0, 100, -1, "", Phase.SETUP),
        ("take", 1, 200, 0, "layer.3", Phase.FORWARD),
        ("take", 2, 300, 0, "layer.3", Phase.RECOMPUTE),
        ("take", 3, 400, 0, "layer.3", Phase.BACKWARD),
        ("release", 1, 200, 0, "layer.3", Phase.BACKWARD),
        ("take", 4, 500, 0, "layer.3", Phase.STEP),
        ("empty cache", -1, 0, 0, "layer.3", Phase.STEP),
    ]


def test_an_allocation_is_named_after_its_operator_and_the_line_that_called_it() -> None:
    frames = [
        {"name": "at::detail::empty_cuda(long)", "filename": "??"},
        {"name": "at::native::mm_out_cuda(at::Tensor const&)", "filename": "??"},
        {"name": "linear", "filename": "/site/torch/nn/functional.py", "line": 5},
        {"name": "forward", "filename": "/site/transformers/modeling_llama.py", "line": 243},
    ]
    assert operator(frames) == "mm_out_cuda | modeling_llama.py:243 forward"


def test_each_stream_has_a_pool_of_its_own_and_peaks_are_those_of_the_steps() -> None:
    mark = "main|0|b|forward"
    events = [
        event("alloc", 1, 64 * MIB),
        event("free_completed", 1, 64 * MIB),
        event("segment_free", 1, 64 * MIB),
        event("alloc", 2, 12 * MIB, mark),
        event("free_completed", 2, 12 * MIB),
        event("alloc", 3, 12 * MIB, mark, stream=7),
    ]
    simulation = simulate(list(requests_of(events)))
    assert simulation.peak_allocated == 12 * MIB
    assert simulation.peak_reserved == 24 * MIB  # what one stream gave back, another one cannot have
    assert [request.nbytes for request, _ in simulation.at_peak] == [12 * MIB]


def test_events_in_another_order_are_told_from_those_in_the_same() -> None:
    real = Step({"forward": [(4, "a"), (2, "b"), (-2, "b"), (8, "c")]})
    ours = Step({"forward": [(4, "a"), (8, "c"), (2, "b"), (-2, "b")]})
    first, *rest = differences_in_order(real, ours, least=1, top=5)
    assert first == "forward: 3 of 4 measured events are predicted in this order, of 4 predicted"
    assert "    predicted +8 c" in rest
    assert list(differences_in_order(real, real, least=1, top=5)) == [
        "forward: 4 of 4 measured events are predicted in this order, of 4 predicted"
    ]


def test_the_environment_says_what_the_catalogue_says() -> None:
    gpu = find_gpu("rtx3090")
    variables = variables_of(gpu)
    assert variables["NULL_CUDA_NAME"] == "NVIDIA GeForce RTX 3090"
    assert (variables["NULL_CUDA_MULTIPROCESSORS"], variables["NULL_CUDA_THREADS_PER_MULTIPROCESSOR"]) == ("82", "1536")
    assert int(variables["NULL_CUDA_TOTAL_BYTES"]) == gpu.usable_bytes
    assert int(variables["NULL_CUDA_NVML_BYTES"]) == gpu.total_bytes
    header = (device.SOURCE / "null_cuda.h").read_text(encoding="utf-8")
    assert [name for name in variables if name not in header and name != "NULL_CUDA_GPU"] == []


def test_at_least_24_traces_of_both_kinds_of_segments_are_of_cases_that_there_are() -> None:
    assert len({trace.name for trace in TRACES}) == len(TRACES) >= 24
    assert {trace.case for trace in TRACES} <= {case.name for case in CASES}
    assert {trace.gpu for trace in TRACES} == set(card.GPUS)
    assert sum(trace.expandable_segments for trace in TRACES) >= 12


def test_without_the_cuda_build_of_torch_it_is_said_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(card, "ENVIRONMENT", tmp_path)
    assert card.main(["--parts", "traces"]) == 2
    assert "make card" in capsys.readouterr().err
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="no CUDA build of torch"):
        device.cuda_headers()

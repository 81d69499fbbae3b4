"""What the null device says of itself, through torch's CUDA build."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.null_cuda.device import build

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def python(on_device: Run, code: str, **options: object) -> str:
    done = on_device(sys.executable, "-c", code, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_function_of_the_cuda_runtime_that_torch_imports_is_served() -> None:
    libraries = Path(sysconfig.get_path("purelib")) / "torch" / "lib"
    wanted = set()
    for path in (libraries / "libtorch_cuda.so", libraries / "libc10_cuda.so", libraries / "libtorch_python.so"):
        wanted |= {name for name in symbols("--undefined-only", path) if name.startswith(("cuda", "__cuda"))}
    assert len(wanted) > 100
    assert wanted - symbols("--defined-only", build()) == set()


def symbols(which: str, path: Path) -> set[str]:
    listed = subprocess.run(["nm", "-D", which, path], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].partition("@")[0] for line in listed.splitlines()}


@pytest.mark.parametrize(("gpu", "name", "multiprocessors"), [("rtx3090", "RTX 3090", 82), ("h200", "H200", 132)])
def test_torch_sees_the_pretended_gpu_and_that_it_is_a_null_device(
    on_device: Run, gpu: str, name: str, multiprocessors: int
) -> None:
    code = "import torch; p = torch.cuda.get_device_properties(0); print(p.name, '|', p.multi_processor_count)"
    seen = python(on_device, code, gpu=gpu)
    assert name in seen
    assert "(null device)" in seen
    assert seen.endswith(f"| {multiprocessors}")


def test_memory_beyond_the_pretended_total_is_refused_and_comes_back_when_freed(on_device: Run) -> None:
    code = """
import torch
free, total = torch.cuda.mem_get_info()
x = torch.empty(free - 2 * 2**20, dtype=torch.uint8, device="cuda")
try:
    torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError as error:
    print("refused", "out of memory" in str(error))
del x
torch.cuda.empty_cache()
print(torch.cuda.mem_get_info() == (free, total), torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda").numel())
"""
    assert python(on_device, code).splitlines() == ["refused True", f"True {64 * 2**20}"]


def test_pinned_memory_is_known_as_pinned_and_other_memory_is_not(on_device: Run) -> None:
    code = "import torch; x = torch.ones(3); print(x.pin_memory().is_pinned(), x.is_pinned(), x.pin_memory().tolist())"
    assert python(on_device, code) == "True False [1.0, 1.0, 1.0]"


def test_several_devices_have_memory_of_their_own(on_device: Run) -> None:
    code = """
import torch
x = torch.empty(2**30, dtype=torch.uint8, device="cuda:1")
print(torch.cuda.device_count(), *(torch.cuda.mem_get_info(i)[0] - torch.cuda.mem_get_info(0)[0] for i in range(3)))
print((x + 1).device, torch.cuda.memory_allocated(0), torch.cuda.memory_allocated(1) >= 2**30)
"""
    assert python(on_device, code, count=3).splitlines() == [f"3 0 {-(2**30)} 0", "cuda:1 0 True"]


@pytest.mark.parametrize(("gpu", "said"), [("a100-80gb", False), ("h200", True)])
def test_where_torch_prefers_an_attention_that_is_not_served_flash_runs_and_this_is_said(gpu: str, said: bool) -> None:
    code = """
import torch
from torch.nn.functional import scaled_dot_product_attention
q = torch.randn(1, 8, 256, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
print(scaled_dot_product_attention(q, q, q, is_causal=True).grad_fn.name())
"""
    command = [sys.executable, "-m", "benchmarks.null_cuda", "--gpu", gpu, "--", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "FlashAttention" in done.stdout, done.stderr
    assert ("flash attention runs in its place" in done.stderr) is said


def test_layers_of_4_bits_and_optimizers_of_8_bits_train(on_device: Run) -> None:
    code = """
import bitsandbytes as bnb, torch
layer = bnb.nn.Linear4bit(1024, 4096, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cuda")
x = torch.randn(4, 64, 1024, dtype=torch.bfloat16, device="cuda", requires_grad=True)
layer(x).sum().backward()
print(layer.weight.dtype, layer.weight.numel(), x.grad.shape)
for kind in (bnb.optim.AdamW8bit, bnb.optim.PagedAdamW8bit, bnb.optim.PagedAdamW32bit):
    weight = torch.nn.Parameter(torch.randn(1024, 1024, dtype=torch.bfloat16, device="cuda"))
    weight.grad = torch.randn_like(weight)
    optimizer = kind([weight])
    before = torch.cuda.memory_allocated()
    optimizer.step()
    print(kind.__name__, (torch.cuda.memory_allocated() - before) // weight.numel())
    del optimizer, weight
"""
    lines = python(on_device, code).splitlines()
    assert lines[0] == "torch.uint8 2097152 torch.Size([4, 64, 1024])"
    # Two moments of a byte each, and what the paged ones keep on the host.
    assert lines[1:] == ["AdamW8bit 2", "PagedAdamW8bit 0", "PagedAdamW32bit 0"]


def test_a_singular_value_decomposition_runs(on_device: Run) -> None:
    code = (
        "import torch; print(*(x.shape for x in torch.linalg.svd(torch.ones(64, 32, device='cuda'), False)), sep=';')"
    )
    assert python(on_device, code) == "torch.Size([64, 32]);torch.Size([32]);torch.Size([32, 32])"


def test_nothing_is_wrong_and_all_is_right_with_what_is_read_back_and_what_was_just_sent_is_there(
    on_device: Run,
) -> None:
    code = """
import torch
x = torch.ones(2, 3, device="cuda")
print(x.isnan().any().item(), x.isfinite().all().item(), bool((x == x).all()), x.sum().item(), x.tolist()[1])
sent = torch.tensor([3, 5], device="cuda")
print(sent.tolist(), sent[1].item(), (sent + 1).tolist(), sent.tolist())
"""
    assert python(on_device, code).splitlines() == ["False True True 0.0 [0.0, 0.0, 0.0]", "[3, 5] 5 [0, 0] [0, 0]"]


def test_a_thread_that_still_works_when_python_ends_does_not_abort_the_process(on_device: Run) -> None:
    code = """
import threading, time, torch
x = torch.ones(1000, device="cuda", requires_grad=True)
def work():
    while True:
        (x * 2).sum().backward()
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(1)
"""
    python(on_device, code)

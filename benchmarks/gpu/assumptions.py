"""What the predictor assumes of a card, measured there: context, workspaces, scratch inside operations, segments.

Runs in a process of its own, before anything else has used the card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from badam.errors import InputError
from badam.profiling.machine import provenance, this_machine
from badam.units import MIB
from badam_planner.recording.kernel_scratch import flash_backward_bytes
from benchmarks.gpu.meter import CudaMeter, Meter
from benchmarks.gpu.record import Assumptions, Scratch

REQUESTS = (1, MIB, MIB + 512, 10 * MIB - 512, 10 * MIB, 10 * MIB + 1, 33 * MIB)
"""Sizes on either side of every rule that the simulated allocator has."""

ATTENTION = (
    # batch, heads, key heads, length, head size
    (8, 32, 32, 728, 128),  # Llama-2-7B
    (2, 32, 8, 728, 128),  # Llama-3-8B
    (1, 32, 8, 8192, 128),
    (8, 14, 2, 512, 64),  # Qwen2.5-0.5B
)
BACKENDS: dict[str, SDPBackend | None] = {
    "default": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
VOCABULARY, HIDDEN, TOKENS = 128_256, 4096, 1456

AttentionSize = tuple[int, int, int, int, int]


def measure_assumptions(command: str) -> Assumptions:
    """Measure the current CUDA device.

    Raises:
        InputError: if there is none.
    """
    idle = _idle_bytes()
    if not torch.cuda.is_available():
        raise InputError("There is no CUDA device to ask.", advice="Use --device cpu for a run without one.")
    device = torch.device("cuda", torch.cuda.current_device())
    meter = CudaMeter()
    contexts: dict[str, int] = {}
    nvml: dict[str, int] = {}

    def note(stage: str) -> None:
        meter.settle()
        contexts[stage] = meter.used() - meter.reserved()
        if (seen := meter.nvml()) is not None:
            nvml[stage] = seen - meter.reserved()

    torch.ones(1, device=device).add_(1)
    note("first kernel")
    segments = segment_bytes(meter, device)
    workspaces = workspace_bytes(meter, device, note)
    scratch = (*attention_scratch(meter, device, ATTENTION), *other_scratch(meter, device))
    note("everything")
    return Assumptions(
        machine=this_machine(device),
        provenance=provenance(command),
        nvml_source=meter.nvml_source,
        idle_bytes=idle,
        context_bytes=contexts,
        nvml_context_bytes=nvml,
        workspace_bytes=workspaces,
        scratch=scratch,
        segment_bytes=segments,
        allocator=_allocator_settings(),
    )


def segment_bytes(meter: Meter, device: torch.device) -> dict[str, int]:
    """What the allocator reserves for a single request of each of :data:`REQUESTS`."""
    reserved = {}
    for size in REQUESTS:
        meter.settle()
        before = meter.reserved()
        tensor = torch.empty(size, dtype=torch.uint8, device=device)
        reserved[str(size)] = meter.reserved() - before
        del tensor
    return reserved


def workspace_bytes(meter: Meter, device: torch.device, note: Callable[[str], None]) -> dict[str, int]:
    """What each operation leaves allocated when its tensors are gone. ``note`` is called after each."""

    def square() -> Tensor:
        return torch.zeros(1024, 1024, dtype=torch.bfloat16, device=device)

    def backward() -> None:
        weight = square().requires_grad_()
        (square() @ weight).sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    operations: dict[str, Callable[[], object]] = {
        "product": lambda: square() @ square(),
        "product with bias": lambda: functional.linear(square(), square(), square()[0].contiguous()),
        "product in fp32": lambda: square().float() @ square().float(),
        "product in backward": backward,  # which runs in a thread of its own on a card
        "batched product": lambda: torch.bmm(square().view(16, 256, 256), square().view(16, 256, 256)),
    }
    left = {}
    for name, operation in operations.items():
        meter.settle()
        before = meter.allocated()
        operation()
        meter.settle()
        left[name] = meter.allocated() - before
        note(name)
    return left


def attention_scratch(meter: Meter, device: torch.device, sizes: tuple[AttentionSize, ...]) -> Iterator[Scratch]:
    """Scratch of attention as transformers calls it, forward and backward, by each kernel that takes the inputs."""
    for size in sizes:
        for name, backend in BACKENDS.items():
            chosen: AbstractContextManager[Any] = nullcontext() if backend is None else sdpa_kernel([backend])
            try:
                with chosen:
                    yield from _one_attention(meter, device, name, size)
            except RuntimeError as error:  # this kernel does not take these inputs, or not on this device
                if isinstance(error, torch.OutOfMemoryError):
                    raise


def _one_attention(meter: Meter, device: torch.device, name: str, size: AttentionSize) -> tuple[Scratch, Scratch]:
    batch, heads, key_heads, length, head_size = size

    def projected(count: int) -> Tensor:
        flat = torch.zeros(batch, length, count, head_size, dtype=torch.bfloat16, device=device)
        return flat.transpose(1, 2).requires_grad_()

    inputs = projected(heads), projected(key_heads), projected(key_heads)
    outputs: list[Tensor] = []

    def forward() -> tuple[Tensor, ...]:
        outputs.append(functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=heads != key_heads))
        return (outputs[-1],)

    shape = f"{batch}×{heads}/{key_heads}×{length}×{head_size}"
    assumed = sum(flash_backward_bytes(inputs[0].shape, inputs[1].shape, inputs[0].element_size()))
    ahead = _scratch(meter, forward)
    kernel = type(outputs[0].grad_fn).__name__
    gradient = torch.zeros_like(outputs[0])
    # What forward saved stays (retain_graph), so that only what backward takes and returns is seen.
    back = _scratch(meter, lambda: torch.autograd.grad(outputs[0], inputs, gradient, retain_graph=True))
    return (
        Scratch(operation=f"attention forward, {name}", shape=shape, kernel=kernel, **ahead),
        Scratch(operation=f"attention backward, {name}", shape=shape, kernel=kernel, **back, assumed_bytes=assumed),
    )


def other_scratch(
    meter: Meter, device: torch.device, *, vocabulary: int = VOCABULARY, hidden: int = HIDDEN, tokens: int = TOKENS
) -> Iterator[Scratch]:
    """Scratch of the embedding's backward, the loss, and the optimizer's step."""
    ids = torch.zeros(tokens, dtype=torch.int64, device=device)
    yield _embedding_scratch(meter, ids, vocabulary, hidden)
    yield from _loss_scratch(meter, ids, vocabulary)
    yield from _step_scratch(meter, torch.zeros(hidden, hidden, device=device, requires_grad=True))


def _embedding_scratch(meter: Meter, ids: Tensor, vocabulary: int, hidden: int) -> Scratch:
    table = torch.zeros(vocabulary, hidden, dtype=torch.bfloat16, device=ids.device, requires_grad=True)
    rows = functional.embedding(ids, table)
    flow = torch.zeros_like(rows)
    return _other(meter, "embedding backward", table, lambda: torch.autograd.grad(rows, table, flow, retain_graph=True))


def _loss_scratch(meter: Meter, ids: Tensor, vocabulary: int) -> Iterator[Scratch]:
    logits = torch.zeros(len(ids), vocabulary, device=ids.device, requires_grad=True)
    detached = logits.detach()
    yield _other(meter, "loss forward", logits, lambda: (functional.cross_entropy(detached, ids),))
    loss = functional.cross_entropy(logits, ids)
    yield _other(meter, "loss backward", logits, lambda: torch.autograd.grad(loss, logits, retain_graph=True))


def _step_scratch(meter: Meter, weight: Tensor) -> Iterator[Scratch]:
    weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.AdamW([weight], fused=True)

    def step() -> tuple[Tensor, ...]:
        optimizer.step()
        return ()

    yield _other(meter, "fused AdamW", weight, step)
    yield _other(meter, "clipping", weight, lambda: (torch.nn.utils.clip_grad_norm_([weight], 1.0),))


def _other(meter: Meter, name: str, of: Tensor, operation: Callable[[], tuple[Tensor, ...]]) -> Scratch:
    return Scratch(operation=name, shape="×".join(map(str, of.shape)), kernel="", **_scratch(meter, operation))


def _scratch(meter: Meter, operation: Callable[[], tuple[Tensor, ...]]) -> dict[str, int]:
    """What an operation takes at its peak beyond what was there and what it returns, and what it returns."""
    operation()  # libraries load and choose on the first call
    meter.settle()
    before = meter.allocated()
    meter.reset_peak()
    results = operation()
    peak, after = meter.peak(), meter.allocated()
    del results
    return {"scratch_bytes": peak - max(after, before), "result_bytes": max(after - before, 0)}


def _idle_bytes() -> int | None:
    """What is in use before this process touches the card: the driver's share and other processes."""
    from badam_planner.sources.nvml import detect_gpu

    try:
        return detect_gpu().used_bytes
    except InputError:
        return None


def _allocator_settings() -> dict[str, str]:
    settings = torch.cuda.memory._snapshot().get("allocator_settings", {})
    return {
        "backend": torch.cuda.get_allocator_backend(),
        **{str(name): str(value) for name, value in settings.items()},
    }

"""A run's requests to torch's allocator, in order, each with the operator and the phase that made it.

The requests come from torch's own record (``torch.cuda.memory._record_memory_history``); phases are written into it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from badam import phases
from badam.vocabulary import Phase
from benchmarks.null_cuda.product import SimulatedAllocator, round_up, simulated_allocator

MOST_EVENTS = 20_000_000

_HELPERS = (
    "empty", "at::detail", "structured_", "TensorIterator", "at::native::zeros", "CachingHost", "resize", "set_output",
    "clone", "contiguous", "at::native::full", "at::cuda::detail",
)  # fmt: skip
"""Functions that allocate for others: whoever called them is of interest."""
_OPERATORS = ("at::native", "at::_ops", "at::cuda", "flash", "Workspace")


@dataclass(frozen=True, slots=True)
class Request:
    """One event of the allocator: memory taken, given back, or all free segments returned to the device."""

    action: Literal["take", "release", "empty cache"]
    number: int  # of the allocation, counted from 0; -1 for the cache
    nbytes: int  # as asked for
    stream: int
    step: int  # optimizer step, counted from 0; -1 before the first
    block: str  # which is active; "" before the first step
    phase: Phase  # of a release: in which the last allocation before it was made
    operator: str  # and line of Python that asked for it; of a release, that asked for it first

    @property
    def rounded(self) -> int:
        """Bytes that the allocator looks for."""
        return round_up(self.nbytes)


@contextmanager
def recorded(position: Callable[[], tuple[int, str]]) -> Iterator[list[Request]]:
    """Record what the current device's allocator is asked within the ``with`` block; the list is filled at its end.

    Args:
        position: tells the optimizer step and the active block.
    """
    import torch

    main = threading.get_ident()

    def mark(_ends: Phase, begins: Phase) -> None:
        # torch keeps what is written here for each thread by itself, so autograd's threads know their own phase only.
        if threading.get_ident() == main:
            step, block = position()
            torch._C._cuda_setMemoryMetadata(f"main|{step}|{block}|{begins.value}")  # type: ignore[attr-defined]
        else:
            torch._C._cuda_setMemoryMetadata(f"other|{begins.value}")  # type: ignore[attr-defined]

    requests: list[Request] = []
    torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS, stacks="all", context="alloc")
    try:
        with phases.listening(mark):
            yield requests
    finally:
        device = torch.cuda.current_device()
        events = torch.cuda.memory._snapshot()["device_traces"][device]
        torch.cuda.memory._record_memory_history(enabled=None)
        requests.extend(requests_of(events))


def requests_of(events: Sequence[Mapping[str, Any]]) -> Iterator[Request]:
    """The requests in a device's trace. Releases of what was taken before the record began are left out."""
    step, block, phase = -1, "", Phase.SETUP
    taken: dict[int, tuple[int, Mapping[str, Any], str]] = {}
    count, before = 0, ""
    for event in events:
        action = event["action"]
        if action == "alloc":
            step, block, phase = _place(event.get("user_metadata", ""), step, block, phase)
            name = operator(event["frames"])
            taken[event["addr"]] = count, event, name
            yield Request("take", count, event["size"], event["stream"], step, block, phase, name)
            count += 1
        elif action == "free_completed" and event["addr"] in taken:
            number, first, name = taken.pop(event["addr"])
            yield Request("release", number, first["size"], first["stream"], step, block, phase, name)
        elif action in ("segment_free", "segment_unmap") and before not in ("segment_free", "segment_unmap"):
            # Segments go back when a cache is emptied, one by one: the first of a series stands for it.
            yield Request("empty cache", -1, 0, event["stream"], step, block, phase, "")
        before = action


def _place(mark: str, step: int, block: str, phase: Phase) -> tuple[int, str, Phase]:
    match mark.split("|"):
        case ["main", at, active, began]:
            return int(at), active, Phase(began)
        case ["other", began] if began == Phase.RECOMPUTE.value:
            return step, block, Phase.RECOMPUTE
        case ["other", _] | [""] if step >= 0:
            return step, block, Phase.BACKWARD  # autograd's threads work in nothing else
    return step, block, phase


def operator(frames: Sequence[Mapping[str, Any]]) -> str:
    """The ATen operator of an allocation, and the innermost line of Python that is not torch's."""
    native = python = ""
    for frame in frames:
        name, file = frame["name"], frame["filename"]
        if file.endswith(".py"):
            if not python and "/torch/" not in file:
                python = f"{file.rpartition('/')[2]}:{frame['line']} {name}"
        elif not native and any(part in name for part in _OPERATORS) and not any(part in name for part in _HELPERS):
            native = name.partition("(")[0].replace("at::native::", "").replace("at::_ops::", "")[:80]
    return f"{native} | {python}"


@dataclass(frozen=True, slots=True)
class Simulation:
    """What the product's simulated allocator makes of a run's requests. Bytes; peaks are of the optimizer steps."""

    peak_allocated: int
    peak_reserved: int
    peak: int  # index of the request after which most was allocated
    at_peak: tuple[tuple[Request, int], ...]  # what is alive there, with the bytes of its block


def simulate(requests: Sequence[Request], *, expandable_segments: bool = False) -> Simulation:
    """Run a run's requests through the product's simulated allocator, one of them for each stream."""
    pools: dict[int, SimulatedAllocator[int, Any]] = {}
    alive: dict[int, tuple[Request, int]] = {}
    allocated = reserved = most_allocated = most_reserved = peak = 0
    at_peak: tuple[tuple[Request, int], ...] = ()
    rising = False
    for index, request in enumerate(requests):
        pool = pools.setdefault(request.stream, simulated_allocator(expandable_segments=expandable_segments))
        before_allocated, before_reserved = pool.allocated, pool.reserved
        if request.action == "take":
            alive[request.number] = request, pool.allocate(request.number, request.nbytes)
        elif request.action == "release":
            if rising:  # only before something goes can there have been a peak: a copy for each step up is not needed
                at_peak, rising = tuple(alive.values()), False
            pool.release(request.number)
            del alive[request.number]
        else:
            for each in pools.values():
                allocated_then, reserved_then = each.allocated, each.reserved
                each.empty_cache()
                if each is not pool:
                    allocated += each.allocated - allocated_then
                    reserved += each.reserved - reserved_then
        allocated += pool.allocated - before_allocated
        reserved += pool.reserved - before_reserved
        if request.step < 0:
            continue
        most_reserved = max(most_reserved, reserved)
        if allocated > most_allocated:
            most_allocated, peak, rising = allocated, index, True
    return Simulation(most_allocated, most_reserved, peak, tuple(alive.values()) if rising else at_peak)

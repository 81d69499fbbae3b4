"""FSDP2 on fake tensors: one process of many, of which the others are not there, and what the tracker has to be told.

FSDP2 itself gathers, reduces and releases here, on whatever streams it does so. Its collectives go to torch's fake
process group, which sends nothing. Five places would otherwise ask for data or for other processes:

* groups of processes within the group become fake ones as well;
* a mesh of devices is made of real numbers, whatever mode is on;
* DTensor asks for the shapes of whole tensors on fake ones of its own, which are no memory of a GPU;
* FSDP2 resizes storages to nothing and back, which no operator tells;
* ranks that compare what they train would wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import _disable_current_modes

from badam_planner.recording.recording import NEVER, TensorRole
from badam_planner.rehearsal.tracker import StorageTracker


@contextmanager
def fake_ranks(count: int) -> Iterator[None]:
    """Be process 0 of ``count``; inside, torch.distributed is initialized and sends nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a rehearsal of several ranks cannot be made by a process that is one of several")
    new_group, mesh = dist.distributed_c10d.new_group, vars(DeviceMesh)["mesh"].fget

    def fake_group(ranks: Any = None, timeout: Any = None, backend: Any = None, *args: Any, **options: Any) -> Any:
        return new_group(ranks, timeout, "fake", *args, **options)

    with ExitStack() as stack:
        stack.enter_context(patch.object(dist, "new_group", fake_group))
        stack.enter_context(patch.object(dist.distributed_c10d, "new_group", fake_group))
        stack.enter_context(patch("badam.optim.block.ranks_of", lambda *_args, **_options: None))
        stack.enter_context(patch.object(DeviceMesh, "mesh", property(_without_modes(mesh))))
        unwatched = _without_modes(ShardingPropagator._propagate_tensor_meta_non_cached)
        stack.enter_context(patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", unwatched))
        dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
        try:
            yield
        finally:
            dist.destroy_process_group()


def _without_modes(function: Any) -> Callable[..., Any]:
    """``function`` outside of fake tensors and of the tracker."""

    def without_modes(*args: Any, **options: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **options)

    return without_modes


class RankTracker(StorageTracker):
    """A tracker that sees the local tensors of sharded ones, storages being resized, and the stream that runs.

    On the CPU a stream does nothing, and is entered and left as on a GPU.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._streams: dict[int, int] = {id(torch.cpu.current_stream()): 0}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes down to its local tensors
        return super().__torch_dispatch__(func, types, args, kwargs)

    def tell(self, tensors: Any, role: TensorRole, state: str = "") -> None:
        """Say what live tensors are, of sharded ones the local part."""
        super().tell(((name, local_of(tensor)) for name, tensor in tensors), role, state)

    def stand_in(self, like: Tensor, parameter: str, role: TensorRole, state: str = "") -> None:
        """Record a tensor that is not there, of a sharded one the local part."""
        super().stand_in(local_of(like), parameter, role, state)

    @contextmanager
    def watching(self) -> Iterator[StorageTracker]:
        """Record operators, modules, phases and resized storages within the ``with`` block."""
        with patch.object(torch.UntypedStorage, "resize_", self._watched_resize()), super().watching():
            yield self

    def _see(self, tensor: Tensor, operation: str) -> int:
        known = len(self.recording.allocations)
        index = super()._see(tensor, operation)
        if index == known:
            self.recording.allocations[index].stream = self._stream()
        return index

    def _stream(self) -> int:
        return self._streams.setdefault(id(torch.cpu.current_stream()), len(self._streams))

    def _watched_resize(self) -> Callable[[Any, int], Any]:
        resize = torch.UntypedStorage.resize_

        def watched(storage: Any, size: int) -> Any:
            before = storage.nbytes()
            resize(storage, size)
            known = self._living.get(storage._cdata)
            if known is None or size == before:
                return storage
            allocation = self.recording.allocations[known[0]]
            if before and allocation.died == NEVER:
                allocation.died = self._tick()
            if size:
                self._living[storage._cdata] = (len(self.recording.allocations), known[1])
                born = self._tick()
                self.recording.allocations.append(
                    replace(
                        allocation,
                        nbytes=size,
                        born=born,
                        died=NEVER,
                        phase=self._phase,
                        module=self.module,
                        operation="resize_",
                        stream=self._stream(),
                    )
                )
            return storage

        return watched

    def _died(self, address: int) -> None:
        known = self._living.get(address)
        if known is not None and self.recording.allocations[known[0]].died != NEVER:
            self._living.pop(address)  # it was resized to nothing before
            return
        super()._died(address)


def local_of(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, or the tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor

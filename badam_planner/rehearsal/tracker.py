"""Watches tensors being born and dying while code runs on fake tensors, and writes it down as events."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from badam import phases
from badam.blocks.names import enclosing
from badam.plan import Target
from badam.vocabulary import Category, Phase
from badam_planner.recording.kernel_scratch import (
    BY_INDEX,
    COLUMN_SUM,
    EMBEDDING_BACKWARD,
    FLASH_BACKWARD,
    FOUR_BIT_PRODUCT,
    PRODUCTS,
    ColumnSum,
    EmbeddingSums,
    Occupancy,
    by_index_bytes,
    column_sum_shape,
    flash_backward_bytes,
    unpacked_bytes,
)
from badam_planner.recording.recording import (
    CATEGORY_OF_ROLE,
    GIVEN,
    NEVER,
    Allocation,
    LayerMark,
    MemoryTraffic,
    Recording,
    ScratchRule,
    TensorRole,
)
from badam_planner.recording.timeline import LOSS_MODULE
from badam_planner.rehearsal.accumulation import accumulates_in_place, holders_of_a_sum, scatters_in_place
from badam_planner.rehearsal.fake_ops import Maker, answer, moved_bytes
from badam_planner.rehearsal.flops import FLOPS, four_bit_product
from badam_planner.rehearsal.owners import Arguments, Owners

INTERRUPTING = (Phase.RECOMPUTE, Phase.STEP)
"""Phases from which backward is resumed; it begins after any other."""

NO_TRAFFIC = MemoryTraffic()


class StorageTracker(TorchDispatchMode):
    """Records the life of every storage that an operator returns while the mode is active.

    A storage is born when the first operator returns a tensor over it and dies when Python's last reference and
    autograd's last saved tensor let go of it, which a weak reference on the storage object reports. Operators'
    internal scratch memory never becomes a tensor and is not seen.

    The module that runs is known in forward from hooks, in backward from the autograd nodes of the modules' outputs:
    autograd reaches the node of a module's output when backward enters that module.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Collection[str] = (),
        *,
        mode: FakeTensorMode | None = None,
        target: Target | None = None,
    ) -> None:
        """Watch ``model``; the beginnings of its ``layers`` (module paths) are marked in the recording.

        Args:
            model: whose modules run.
            layers: module paths.
            mode: of the fake tensors, whose operators are then answered from memory where that is possible.
            target: the device whose kernels' scratch is recorded; None records only what every GPU takes.
        """
        super().__init__()
        self._maker = None if mode is None else Maker(mode)
        self._layers = frozenset(layers)
        self._on_cpu = target is not None and target.gpu == "cpu"
        self._on_gpu = None if target is None or self._on_cpu else Occupancy.of(target)
        self._workspace_bytes = 0 if target is None or self._on_cpu else target.workspace_bytes
        self._threads_with_workspace: set[bool] = set()  # whether it is autograd's
        self.recording = Recording()
        self.counts_work = True
        """Whether work is noted; outside of layers it is all the same, since it tells whose turn it is."""
        self._names = {id(module): name for name, module in model.named_modules()}
        self._living: dict[int, tuple[int, weakref.ref[Any]]] = {}  # storage address -> index of its allocation
        self._owners = Owners(self._layers, self.recording, self._index_of)
        self._stack: list[str] = []
        self._backward_module = ""
        self._unshared = holders_of_a_sum()
        self._phase = phases.current()
        self.recording.phase_starts = [(0, self._phase)]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here: torch need not put a guard against that around every operator."""
        return False

    # -- what the operators tell

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # every look at ``tensor.device`` comes here: half of all calls
            return args[0].fake_device
        kwargs = kwargs or {}
        if self._phase is Phase.BACKWARD and accumulates_in_place(func, args, self._unshared):
            self._count(func, args, kwargs, args[0], moved_bytes(func, args, kwargs, args[0]))
            return args[0]  # there is no data to add
        if self._phase is Phase.BACKWARD and scatters_in_place(func):
            output, moved = args[0], moved_bytes(func, args, kwargs, args[0])
        else:
            output, moved = answer(self._maker, func, args, kwargs)
        name = str(func)
        if self._stack or enclosing(self.module, self._layers):
            for leaf in (output,) if isinstance(output, Tensor) else tree_leaves(output):
                if isinstance(leaf, Tensor):
                    self._see(leaf, name)
        else:
            self._see_owned(func, (args, kwargs), output)
        if name == FLASH_BACKWARD:
            _, query, key = args[:3]
            sizes = flash_backward_bytes(query.shape, key.shape, query.element_size())
            self._pass_through(sizes, name, TensorRole.FLASH_SCRATCH, gpu_only=True)
        elif name == FOUR_BIT_PRODUCT:
            inputs, _, shape, _, blocksize = args[:5]
            sizes = unpacked_bytes(shape, blocksize, inputs.element_size())
            self._pass_through(sizes, name, TensorRole.UNPACKED_WEIGHT, gpu_only=False)
            FLOPS.setdefault(func._overloadpacket, four_bit_product)  # it exists since bitsandbytes was imported
        elif self._on_cpu and name in BY_INDEX:
            sizes = by_index_bytes(output.shape, output.element_size())
            self._pass_through(sizes, name, TensorRole.FP32_COPY, gpu_only=False)
        elif self._on_gpu is not None:
            self._take_on_a_gpu(name, self._on_gpu, args)
        self._count(func, args, kwargs, output, moved)
        return output

    def _take_on_a_gpu(self, name: str, gpu: Occupancy, args: tuple[Any, ...]) -> None:
        """Record what an operator takes besides its output, after it, on the GPU that is planned for."""
        if name in PRODUCTS:
            if self._workspace_bytes and len(self._threads_with_workspace) < 2:
                self._take_workspace(name)
        elif name == COLUMN_SUM:
            shape = column_sum_shape(args[0].shape, args[1] or ()) if args[0].is_contiguous() else None
            if shape is not None:
                self._pass_by_rule(shape[0], ColumnSum(shape[1], gpu), name)
        elif name == EMBEDDING_BACKWARD:
            gradient, indices, vocabulary = args[:3]
            self._pass_by_rule(indices.numel(), EmbeddingSums(vocabulary, gradient.shape[-1]), name)

    def _take_workspace(self, name: str) -> None:
        """The first product of each thread takes a workspace for good: the main one's, and autograd's for backward."""
        autograds = torch._C._current_autograd_node() is not None
        if autograds in self._threads_with_workspace:
            return
        self._threads_with_workspace.add(autograds)
        nbytes = self._workspace_bytes
        workspace = Allocation(nbytes, self._tick(), NEVER, self._phase, self.module, name, (nbytes,), "uint8")
        workspace.category, workspace.gpu_only = Category.WORKSPACE, True
        workspace.role = TensorRole.MATMUL_WORKSPACE
        self.recording.allocations.append(workspace)

    def _see_owned(self, func: Any, arguments: Arguments, output: Any) -> None:
        """See what an operator returns where no layer runs, and note whose it is."""
        for tensor, layer, shares in self._owners.outputs(func, arguments, output):
            known = len(self.recording.allocations)
            index = self._see(tensor, str(func))
            if index == known:
                self._owners.computed(index, layer, shares)
                allocation = self.recording.allocations[index]
                allocation.owner, allocation.shares = layer, shares

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, moved: int) -> None:
        """Note the work of one operator where it is done; outside of layers with the one that it is done for."""
        place = (self._phase, self.module)
        recording = self.recording
        outside = not self._stack and not enclosing(place[1], self._layers)
        if not self.counts_work and not outside:
            return
        formula = FLOPS.get(func._overloadpacket)
        if formula is not None:
            if outside:
                place = (place[0], self._owners.whose_turn((args, kwargs)) or place[1])
            recording.flops[place] = recording.flops.get(place, 0) + formula(*args, **kwargs, out_val=output)
        if moved and outside:
            self._count_owned(func, (args, kwargs), moved, place)
        elif moved:
            one = MemoryTraffic(0, moved, 1) if formula is None else MemoryTraffic(moved, 0, 1)
            recording.traffic[place] = recording.traffic.get(place, NO_TRAFFIC) + one

    def _count_owned(self, func: Any, arguments: Arguments, moved: int, place: tuple[Phase, str]) -> None:
        """Note the bytes that an operator outside of layers moves with the layers that it moves them for."""
        traffic = self.recording.traffic
        *parts, rest = self._owners.traffic(func, arguments, moved)
        for layer, nbytes in parts:
            own = (place[0], layer or place[1])
            traffic[own] = traffic.get(own, NO_TRAFFIC) + MemoryTraffic(0, nbytes, 0)
        own = (place[0], rest[0] or place[1])
        traffic[own] = traffic.get(own, NO_TRAFFIC) + MemoryTraffic(0, rest[1], 1)

    def _index_of(self, tensor: Tensor) -> int | None:
        """The allocation that a tensor looks at; None if it was never seen."""
        values = getattr(tensor, "window_values", tensor)  # see badam.optim.window_gradient
        known = self._living.get(values.untyped_storage()._cdata)
        return None if known is None else known[0]

    def _pass_by_rule(self, rows: int, rule: ScratchRule, operation: str) -> None:
        """Record a GPU kernel's scratch, also where it is nothing at this size: at another it may be something."""
        self._pass_through((rule.nbytes(rows),), operation, TensorRole.PARTIAL_SUMS, gpu_only=True)
        self.recording.allocations[-1].rule, self.recording.allocations[-1].rows = rule, rows

    def _pass_through(self, sizes: Iterable[int], operation: str, role: TensorRole, *, gpu_only: bool) -> None:
        """Record scratch of a kernel: born together, dead before the operator returns."""
        scratch = [
            Allocation(nbytes, self._tick(), NEVER, self._phase, self.module, operation, (nbytes,), "uint8")
            for nbytes in sizes
        ]
        for allocation in scratch:
            allocation.gpu_only, allocation.role = gpu_only, role
            allocation.died = self._tick()
        self.recording.allocations += scratch

    def _see(self, tensor: Tensor, operation: str) -> int:
        storage = tensor.untyped_storage()
        address = storage._cdata
        known = self._living.get(address)
        if known is not None:
            return known[0]
        index = len(self.recording.allocations)
        self.recording.allocations.append(
            Allocation(
                nbytes=storage.nbytes(),
                born=self._tick(),
                died=NEVER,
                phase=self._phase,
                module=self.module,
                operation=operation,
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
            )
        )
        self._living[address] = (index, weakref.ref(storage, lambda _: self._died(address)))
        return index

    def _died(self, address: int) -> None:
        known = self._living.pop(address, None)
        if known is not None:
            self.recording.allocations[known[0]].died = self._tick()

    def _tick(self) -> int:
        tick = self.recording.end
        self.recording.end = tick + 1
        return tick

    # -- what the rehearsal tells

    def tell(self, tensors: Iterable[tuple[str, Tensor]], role: TensorRole, state: str = "") -> None:
        """Say what live tensors are; those not seen before (made before the mode was entered) are born now.

        Args:
            tensors: each with the name of the weight that it is or belongs to.
            role: what all of them are.
            state: which of the optimizer's states they are.
        """
        for parameter, tensor in tensors:
            index = self._see(tensor, GIVEN)
            allocation = self.recording.allocations[index]
            allocation.owner = self._owners.told(index, parameter)
            allocation.category = CATEGORY_OF_ROLE[role]
            allocation.role, allocation.parameter, allocation.state = role, parameter, state

    def stand_in(self, like: Tensor, parameter: str, role: TensorRole, state: str = "") -> None:
        """Record a tensor that is not there: it is like a live one that was told of, and outlives the recording."""
        known = self.recording.allocations[self._see(like, GIVEN)]
        born, category = self._tick(), CATEGORY_OF_ROLE[role]
        self.recording.allocations.append(
            replace(known, born=born, died=NEVER, category=category, role=role, parameter=parameter, state=state)
        )

    def begin_step(self) -> None:
        """What follows is no layer's, whoever's the last operator was."""
        self._owners.begin(self._phase)

    # -- where the code is

    @property
    def module(self) -> str:
        """Path of the module that runs now."""
        in_backward = self._phase in (Phase.BACKWARD, Phase.RECOMPUTE)
        inside = self._stack[-1] if self._stack else (self._backward_module if in_backward else "")
        return LOSS_MODULE if inside == "" and self._phase is Phase.LOSS else inside

    @contextmanager
    def watching(self) -> Iterator[StorageTracker]:
        """Record operators, modules and phases within the ``with`` block."""
        with ExitStack() as stack:
            stack.callback(register_module_forward_pre_hook(self._enter_module).remove)
            stack.callback(register_module_forward_hook(self._leave_module, always_call=True).remove)
            stack.enter_context(phases.listening(self._change_phase))
            stack.enter_context(self)
            stack.callback(self._living.clear)  # what dies after the recording has no date in it
            yield self

    def _change_phase(self, _previous: Phase, phase: Phase) -> None:
        # Recomputation and updates inside backward interrupt it, and it goes on in the module where it was.
        if phase is Phase.BACKWARD and self._phase not in INTERRUPTING:
            self._backward_module = LOSS_MODULE
        self._phase = phase
        self._owners.begin(phase)
        self.recording.phase_starts.append((self._tick(), phase))

    def _enter_module(self, module: nn.Module, _args: Any) -> None:
        name = self._names.get(id(module))
        if name is not None:
            self._mark("forward", name)
            self._stack.append(name)

    def _leave_module(self, module: nn.Module, _args: Any, output: Any) -> None:
        name = self._names.get(id(module))
        if name is None:
            return
        self._stack.pop()
        if not name or self._phase is Phase.RECOMPUTE or not torch.is_grad_enabled():
            return  # the model's own output is the loss, and a recomputed graph never runs backward
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                leaf.grad_fn.register_prehook(self._entering(name))

    def _entering(self, name: str) -> Callable[[tuple[Tensor, ...]], None]:
        def enter(_gradients: tuple[Tensor, ...]) -> None:
            self._mark("backward", name)
            self._backward_module = name

        return enter

    def _mark(self, kind: Literal["forward", "backward"], name: str) -> None:
        if name in self._layers and self._phase is not Phase.RECOMPUTE:
            self.recording.layer_marks.append(LayerMark(self._tick(), kind, name))

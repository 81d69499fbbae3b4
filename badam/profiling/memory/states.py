"""Which live tensors a run holds by name: parameters, gradients, master copies, optimizer states."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from badam.profiling.selection import ComingStep
from badam.tensors.dtensor import is_held_by_deepspeed, local_part, shape_of
from badam.vocabulary import Category

NAMED = (Category.PARAMETER, Category.MASTER, Category.OPTIMIZER_STATE, Category.GRADIENT)
"""What :class:`ModelStates` can name."""


class Named(NamedTuple):
    """A tensor and what it is."""

    tensor: Tensor
    category: Category

    @property
    def address(self) -> int:
        """Where its memory begins; tensors that share memory share it."""
        return local_part(self.tensor).untyped_storage().data_ptr()

    @property
    def nbytes(self) -> int:
        """Size of its memory."""
        return local_part(self.tensor).untyped_storage().nbytes()


class ModelStates:
    """The named tensors of one model and its optimizer, looked up when asked, since optimizers replace them.

    Args:
        model: any module tree.
        optimizer: a torch optimizer; of a block optimizer also the master copies are known. A wrapper that holds
            the optimizer as ``.optimizer`` (accelerate's) is looked through.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = unwrap(optimizer)
        self.base_optimizer: torch.optim.Optimizer = base_of(self.optimizer)

    def parameters(self) -> list[Named]:
        """The model's parameters and buffers, and what quantized parameters keep to be unpacked with.

        Of what DeepSpeed has partitioned it is this process's part, and the whole of what stays gathered.
        """
        scales = (tensor for parameter in self.model.parameters() for tensor in _quantization(parameter))
        parts: Iterator[Tensor] = (
            getattr(parameter, "ds_tensor")  # noqa: B009 - DeepSpeed's, which torch's class does not know
            for parameter in self.model.parameters()
            if is_held_by_deepspeed(parameter)
        )
        every = (*parts, *self.model.parameters(), *self.model.buffers(), *scales)
        return [Named(tensor, Category.PARAMETER) for tensor in every]

    def optimizer_states(self) -> list[Named]:
        """Master copies, where they are not the parameters themselves, and the base optimizer's state tensors.

        What an optimizer keeps in host memory for blocks that are away counts as states.
        """
        copies = [
            Named(master, Category.MASTER)
            for _, parameter, master in masters(self.optimizer)
            if master is not parameter
        ]
        copies += [Named(master, Category.MASTER) for master in self._of_deepspeed("masters")]
        states = [value for _, _, value in state_tensors(self.base_optimizer)]
        away = [tensor for kept in _host_states(self.optimizer).values() for tensor in _tensors(list(kept.values()))]
        return copies + [Named(value, Category.OPTIMIZER_STATE) for value in (*states, *away)]

    def gradients(self) -> list[Named]:
        """Gradients of the model's parameters and of master copies, as far as they exist now."""
        owners = (*self.model.parameters(), *(master for _, _, master in masters(self.optimizer)))
        found = [owner.grad for owner in owners if owner.grad is not None]
        return [Named(gradient, Category.GRADIENT) for gradient in (*found, *self._of_deepspeed("gradients"))]

    def _of_deepspeed(self, what: str) -> list[Tensor]:
        """What DeepSpeed keeps of a kind while it drives the optimizer."""
        driver = getattr(self.optimizer, "driven_by", None)
        return [] if driver is None else getattr(driver, what)()

    def active_block(self) -> int:
        """Index of the block that is trained now; 0 for an optimizer without blocks."""
        return int(getattr(self.optimizer, "current_block_idx", 0))

    def states_kept(self) -> int:
        """How many parameters have optimizer states now, those of blocks that are away included."""
        return len(self.base_optimizer.state) + len(_host_states(self.optimizer))

    def coming_step(self) -> ComingStep:
        """What decides the memory of the coming step, as far as model and optimizer know."""
        done = getattr(self.optimizer, "steps_in_visit", None)  # None: this optimizer has no visits
        length = getattr(self.optimizer, "switch_block_every", getattr(self.optimizer, "switch_every", 0))
        begins, ends = done == 0, done is not None and done + 1 == length
        active = 0
        if begins or ends:  # asked before every step, and most are neither
            active = sum(prod(shape_of(each)) for each in self.model.parameters() if each.requires_grad)
        return ComingStep(self.active_block(), begins, ends, self.states_kept(), active)


def masters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, parameter and master of all that is trained now through one of this package's optimizers.

    The master is the parameter itself where no copy is needed.
    """
    trained: Iterable[Any] = getattr(optimizer, "active_parameters", getattr(optimizer, "windows", ()))
    for member in trained:
        if member.master is not None:
            yield member.name, member.parameter, member.master


def base_of(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that holds the states: the base of one that has a base, else itself."""
    return getattr(optimizer, "base_optimizer", None) or optimizer


def state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, str, Tensor]]:
    """An optimizer's state tensors, each with the parameter that it belongs to and its name.

    Some libraries keep tensors in objects of their own inside the state; these are looked into.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items() if isinstance(state, dict) else ():
            for tensor in _tensors(value):
                yield parameter, key, tensor


def unwrap(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper, or the optimizer itself; that for which DeepSpeed's engine steps."""
    inner = getattr(optimizer, "optimizer", None)
    found: torch.optim.Optimizer = inner if isinstance(inner, torch.optim.Optimizer) else optimizer
    return getattr(found, "stands_for", found)


def distinct_bytes(named: Iterable[Named]) -> dict[Category, int]:
    """Bytes of the distinct memory under tensors, by category."""
    sizes = {(one.category, one.address): one.nbytes for one in named}
    totals: dict[Category, int] = {}
    for (category, _), nbytes in sizes.items():
        totals[category] = totals.get(category, 0) + nbytes
    return totals


def live_cpu_tensors() -> Iterator[Tensor]:
    """Every CPU tensor that Python knows of, with its gradient.

    Tensors that only a backward graph holds are not among them; between steps there is none.
    """
    for candidate in gc.get_objects():
        # Not isinstance(): it asks for __class__, which lazy modules answer by importing themselves. Other tensor
        # classes (fake, functional, distributed) have no memory of their own.
        if type(candidate) in (Tensor, nn.Parameter) and _has_cpu_memory(candidate):
            yield candidate
            # A view is not asked: torch refuses to say of one made without gradients whether it is a leaf, once its
            # base was written to with them, and no view of a run holds a gradient.
            if (
                not candidate._is_view()
                and candidate.is_leaf
                and candidate.grad is not None
                and _has_cpu_memory(candidate.grad)
            ):
                yield candidate.grad


def _host_states(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """What an optimizer keeps in host memory, by parameter; most keep nothing there."""
    kept: dict[str, dict[str, Any]] = getattr(optimizer, "host_states", {})
    return kept


def _quantization(parameter: Tensor) -> Iterator[Tensor]:
    """The scales that bitsandbytes hangs onto a parameter in 4 bits, and the scales of those."""
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        yield from _tensors(state)
        state = getattr(state, "state2", None)


def _has_cpu_memory(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.layout is torch.strided


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        yield from (item for item in value if isinstance(item, Tensor))
    elif hasattr(value, "__dict__"):
        for item in vars(value).values():
            yield from _tensors(item) if isinstance(item, (Tensor, list, tuple)) else ()

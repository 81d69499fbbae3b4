"""Which live tensors a run holds by name: parameters, gradients, master copies, optimizer states."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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
        return self.tensor.untyped_storage().data_ptr()

    @property
    def nbytes(self) -> int:
        """Size of its memory."""
        return self.tensor.untyped_storage().nbytes()


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
        self.base_optimizer: torch.optim.Optimizer = getattr(self.optimizer, "base_optimizer", self.optimizer)

    def parameters(self) -> list[Named]:
        """The model's parameters and buffers."""
        return [Named(tensor, Category.PARAMETER) for tensor in (*self.model.parameters(), *self.model.buffers())]

    def optimizer_states(self) -> list[Named]:
        """Master copies, where they are not the parameters themselves, and the base optimizer's state tensors."""
        own: dict[int, Tensor] = getattr(self.optimizer, "param_idx2lp", {})
        masters: dict[int, Tensor] = getattr(self.optimizer, "param_idx2hp", {})
        copies = [Named(copy, Category.MASTER) for index, copy in masters.items() if copy is not own.get(index)]
        states = (value for state in self.base_optimizer.state.values() for value in _tensors(state))
        return copies + [Named(value, Category.OPTIMIZER_STATE) for value in states]

    def gradients(self) -> list[Named]:
        """Gradients of the model's parameters and of master copies, as far as they exist now."""
        masters: dict[int, Tensor] = getattr(self.optimizer, "param_idx2hp", {})
        owners = (*self.model.parameters(), *masters.values())
        return [Named(owner.grad, Category.GRADIENT) for owner in owners if owner.grad is not None]

    def active_block(self) -> int:
        """Index of the block that is trained now; 0 for an optimizer without blocks."""
        return int(getattr(self.optimizer, "current_block_idx", 0))

    def position(self) -> tuple[bool, bool]:
        """Whether the coming step is the first of its visit, and whether it is the last."""
        done = int(getattr(self.optimizer, "steps_in_visit", 0))
        return done == 0, done + 1 == int(getattr(self.optimizer, "switch_block_every", 0))


def unwrap(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper, or the optimizer itself."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if isinstance(inner, torch.optim.Optimizer) else optimizer


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
            if candidate.is_leaf and candidate.grad is not None and _has_cpu_memory(candidate.grad):
                yield candidate.grad


def _has_cpu_memory(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.layout is torch.strided


def _tensors(state: Any) -> Iterator[Tensor]:
    return (value for value in state.values() if isinstance(value, Tensor)) if isinstance(state, dict) else iter(())

"""One parameter of the active block: which part of it is trained, and its gradient in fp32."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from badam.optim.master import HALF_TYPES, MasterCopy
from badam.tensors.dtensor import is_sharded, local_part, shard_number, version_of
from badam.tensors.functional import copy_nearest_, is_fake, round_stochastically_

HAS_GRAD_DTYPE = hasattr(torch.Tensor, "grad_dtype")
"""Whether autograd itself can accumulate a 16-bit parameter's gradient in fp32 (torch 2.10)."""


class ActiveParameter(MasterCopy):
    """A parameter (or a range of its rows) while its block is active.

    A parameter of fp32 or wider is its own master.

    The gradient is fp32. Either autograd accumulates it so in ``parameter.grad`` (``visible``: clipping by the host
    then simply works), or a hook takes it away as soon as it is complete: for row ranges, for an update that reads
    the model's type, for an update that happens at once, and where torch cannot do the former.

    Args:
        name: in the model.
        parameter: the model's parameter, any floating type; may be sharded over processes (a DTensor).
        rows: train only these rows ``(begin, end)``.
    """

    def __init__(self, name: str, parameter: nn.Parameter, rows: tuple[int, int] | None = None) -> None:
        super().__init__(name, parameter)
        self.rows = rows
        self.master = None
        self.hides_gradient = False  # whether a hook takes the gradient away from parameter.grad
        self._keep_dtype = False
        self._taken: Tensor | None = None
        self._sum: Tensor | None = None
        self._summed: Callable[[], Tensor | None] = _nothing
        self._summed_version = -1
        self._handle: RemovableHandle | None = None

    @property
    def is_copied(self) -> bool:
        """Whether training goes through an fp32 copy, because the parameter has too few bits to train itself."""
        return self.parameter.dtype in HALF_TYPES

    @property
    def is_sharded(self) -> bool:
        """Whether this process may hold only a part of the parameter; master and gradient are cut alike."""
        return is_sharded(self.parameter)

    @property
    def shard_number(self) -> int:
        """Which part of the parameter this process holds."""
        return shard_number(self.parameter)

    @property
    def weight(self) -> Tensor:
        """The trained part of the model's parameter, outside autograd; shares its memory."""
        weight = self.parameter.detach()
        return weight if self.rows is None else weight[self.rows[0] : self.rows[1]]

    # Gradient

    def collect_gradients(
        self, *, visible: bool, keep_dtype: bool = False, ready: Callable[[ActiveParameter], None]
    ) -> None:
        """Begin to collect gradients.

        Args:
            visible: leave them in ``parameter.grad``.
            keep_dtype: a hidden gradient of one batch stays in the model's type.
            ready: called when a gradient is complete, within backward.
        """
        self.parameter.requires_grad_(True)
        self.hides_gradient = not visible
        if visible and self.is_copied:
            self.parameter.grad_dtype = torch.float32

        self._keep_dtype = keep_dtype
        # torch keeps hooks where Python's garbage collector does not look: one that held this object would keep model
        # and optimizer alive forever.
        self._ready = ready
        weakly = weakref.ref(self)

        def on_accumulated(parameter: Tensor) -> None:
            member = weakly()
            if member is not None and parameter.grad is not None:
                member.take_gradient()
                member._sum_gradient()
                member._ready(member)

        self._handle = self.parameter.register_post_accumulate_grad_hook(on_accumulated)

    def take_gradient(self) -> None:
        """Take a hidden gradient out of ``parameter.grad``, whether backward or the caller put it there."""
        if not self.hides_gradient or self.parameter.grad is None:
            return
        gradient, self.parameter.grad = self.parameter.grad, None
        if self.rows is not None:
            gradient = gradient[self.rows[0] : self.rows[1]]
        if self._taken is not None:
            # Whatever the first one was kept in, a sum of several is accumulated in fp32.
            self._taken = self._taken.to(torch.promote_types(gradient.dtype, torch.float32)).add_(gradient)
        elif self._keep_dtype or not self.is_copied:
            self._taken = gradient if self.rows is None else gradient.clone()  # not to keep all rows alive
        else:
            self._taken = gradient.float()

    def _sum_gradient(self) -> None:
        """Sum the gradient while it is in the cache: infinities and NaN survive a sum, so the step need not look."""
        gradient = self.gradient
        if gradient is not None:
            dtype = torch.float32 if gradient.dtype == torch.float16 else None
            self._sum = local_part(gradient).sum(dtype=dtype).float()
            self._summed = weakref.ref(gradient)
            self._summed_version = version_of(gradient)

    def finiteness(self) -> Tensor | None:
        """A number (shape (), fp32) that is finite if the gradient is; None if there is no gradient."""
        gradient = self.gradient
        if gradient is None:
            return None
        if self._summed() is not gradient or (not is_fake(gradient) and version_of(gradient) != self._summed_version):
            self._sum_gradient()  # someone has scaled or replaced it since, clipping for instance
        return self._sum

    @property
    def gradient(self) -> Tensor | None:
        """The gradient accumulated so far, of the shape of :attr:`weight`; None if there was none."""
        return self._taken if self.hides_gradient else self.parameter.grad

    def zero_gradient(self) -> None:
        """Set a gradient of zeros if there is none, because the batches of this process did not use the parameter."""
        if self.gradient is not None:
            return
        zeros = torch.zeros_like(self.weight, dtype=torch.promote_types(self.parameter.dtype, torch.float32))
        if self.hides_gradient:
            self._taken = zeros
        else:
            self.parameter.grad = zeros

    def drop_gradient(self) -> None:
        """Release the gradient."""
        self._taken = self._sum = None
        self.parameter.grad = None

    # Master

    def adopt_master(self, master: Tensor) -> None:
        """Use ``master`` (fp32, of the shape of :attr:`weight`), from which the current weight was rounded."""
        self.master = master if master is self.parameter else nn.Parameter(master)
        self.mark_written()

    def load_master(self, saved: Tensor) -> None:
        """Take a saved master; a copy on the parameter's device, so that nothing is shared with the saved state."""
        self.adopt_master(saved.detach().to(device=self.parameter.device, dtype=torch.float32, copy=True))

    def _read_master(self) -> None:
        if self.is_copied:
            self.adopt_master(self.weight.float())
        else:
            self.adopt_master(self.parameter if self.rows is None else self.weight)

    def _weights_as_master(self) -> Tensor:
        return local_part(self.weight).float()

    def _round_stochastically(self, generator: torch.Generator) -> None:
        assert self.master is not None
        round_stochastically_(local_part(self.weight), local_part(self.master), generator)

    def close(self) -> None:
        """Leave the block: release everything, and let the model's parameter be frozen as it was found."""
        self.drop_gradient()
        self.master, self.is_loaded = None, False
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if HAS_GRAD_DTYPE and self.is_copied:
            self.parameter.grad_dtype = self.parameter.dtype
        self.parameter.requires_grad_(False)


def _nothing() -> None:
    """Stands for a reference whose tensor is gone."""


def write_nearest(members: Sequence[ActiveParameter]) -> None:
    """Round the masters of ``members`` into the model, to nearest; no temporaries."""
    copied = [(member, member.master) for member in members if member.is_copied and member.master is not None]
    weights = [local_part(member.weight) for member, _ in copied]
    copy_nearest_(weights, [local_part(master) for _, master in copied])
    for member, _ in copied:
        member.mark_written()

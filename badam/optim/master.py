"""The fp32 master of a weight that is trained: read from the model, kept in step with it, written back into it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from badam.tensors.dtensor import local_part, version_of
from badam.tensors.functional import is_fake, is_rounding_of

HALF_TYPES = (torch.bfloat16, torch.float16)
"""Types that lose what a small update adds, so that a copy of more bits is trained in the weight's place."""


class MasterCopy:
    """The master of one parameter, or of the part of it that is trained; subclasses say which part that is.

    It is read from the model when it is first needed, not before: whoever loads a checkpoint into the model after the
    optimizer was built must not have it overwritten. For the same reason it is read again, and not written, where
    somebody else has changed the model's weights since they were written here.

    Args:
        name: of the parameter in the model.
        parameter: the model's parameter.
    """

    master: Tensor | None

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name = name
        self.parameter = parameter
        self.is_loaded = False
        self._written_version = -1

    @property
    def is_copied(self) -> bool:
        """Whether the master is a copy, and not the parameter itself."""
        return True

    def ready_master(self) -> Tensor:
        """The master, read from the model if that was not done, or if somebody has changed the weights since.

        A weight within one unit of the last place of its master counts as unchanged: it is the master, rounded, as a
        checkpoint holds it that is loaded into the model after the optimizer's state.
        """
        if not self.is_loaded:
            self._read_master()
            self.mark_written()
        elif self.is_copied and not self._is_as_written():
            assert self.master is not None
            weights, master = self._weights_as_master(), local_part(self.master)
            if not is_rounding_of(weights, master, self.parameter.dtype):
                master.copy_(weights)
        assert self.master is not None
        return self.master

    def mark_written(self) -> None:
        """Remember that there is a master, and that the weights are now what it rounds to."""
        self.is_loaded = True
        if not is_fake(self.parameter):
            self._written_version = version_of(self.parameter)

    def write_stochastically(self, generator: torch.Generator) -> None:
        """Round the master into the model without bias, unless somebody has changed the weights since."""
        if self.is_loaded and self.parameter.dtype in HALF_TYPES and self._is_as_written():
            self._round_stochastically(generator)
            self.mark_written()

    def _is_as_written(self) -> bool:
        return is_fake(self.parameter) or version_of(self.parameter) == self._written_version

    def _read_master(self) -> None:
        """Set :attr:`master` to the model's weights."""
        raise NotImplementedError

    def _weights_as_master(self) -> Tensor:
        """This process's part of the weights, in the type and shape of the master."""
        raise NotImplementedError

    def _round_stochastically(self, generator: torch.Generator) -> None:
        """Write the master, rounded without bias, into the weights."""
        raise NotImplementedError

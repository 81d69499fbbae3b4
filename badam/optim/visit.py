"""The active block: beginning a visit to it, writing it back, and ending the visit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from badam.blocks.names import belongs, rows_of
from badam.errors import InputError
from badam.optim import driver
from badam.optim.active_parameter import HAS_GRAD_DTYPE, ActiveParameter
from badam.optim.model_blocks import BlocksOfModel, freeze
from badam.tensors.dtensor import is_sharded, seed_of_shard


class ActiveBlock:
    """The parameters of a model that are trained now; :class:`badam.BlockOptimizer` owns one and says which.

    Args:
        model: the model's parameters and blocks.
        hides_gradients: take gradients out of ``parameter.grad``.
        keep_dtype: leave a hidden gradient of one batch in the model's type.
        on_gradient: called when a parameter's gradient is complete, within backward.
    """

    def __init__(
        self,
        model: BlocksOfModel,
        *,
        hides_gradients: bool,
        keep_dtype: bool,
        on_gradient: Callable[[ActiveParameter], None],
    ) -> None:
        self.members: list[ActiveParameter] = []
        self.hides_gradients = hides_gradients
        self.zero3: driver.ZeroThree | None = None  # through which DeepSpeed drives the optimizer, if it does
        self._model = model
        self._keep_dtype = keep_dtype
        self._on_gradient = on_gradient

    def begin(self, prefixes: Sequence[str]) -> None:
        """Train what lies under ``prefixes``, and nothing else.

        Raises:
            InputError: if they select rows of a parameter that is sharded.
        """
        for name, parameter in self._model.trainable:
            if belongs(name, prefixes):
                self.members.append(ActiveParameter(name, parameter, _rows(name, parameter, prefixes)))
        active = {member.name for member in self.members}
        for name, parameter in self._model.named_parameters:
            if name not in active and name not in self._model.frozen:
                freeze(parameter)
        if self.zero3 is not None:
            for member in self.members:
                member.parameter.requires_grad_(True)
            self.zero3.enter_block()
            return
        # FSDP2 rounds what it has summed to the parameter's type; several batches are added up in fp32 here.
        hidden = self.hides_gradients or any(
            member.rows or member.is_sharded or (member.is_copied and not HAS_GRAD_DTYPE) for member in self.members
        )
        for member in self.members:
            member.collect_gradients(visible=not hidden, keep_dtype=self._keep_dtype, ready=self._on_gradient)

    def write_back(self, seed: int) -> None:
        """Round the masters into the model without bias, drawing from ``seed``; the masters stay."""
        if self.zero3 is not None:
            self.zero3.round_stochastically()
            return
        generators: dict[tuple[torch.device, int], torch.Generator] = {}
        for member in self.members:
            device, shard = member.parameter.device, member.shard_number
            if (device, shard) not in generators:
                generators[device, shard] = torch.Generator(device).manual_seed(seed_of_shard(seed, shard))
            member.write_stochastically(generators[device, shard])

    def end(self) -> None:
        """Release masters and gradients, and freeze the parameters."""
        if self.zero3 is not None:
            self.zero3.leave_block()
        for member in self.members:
            member.close()
            freeze(member.parameter)
        self.members = []

    def hand_over(self, zero3: driver.ZeroThree) -> None:
        """Leave gradients, masters and states to DeepSpeed from here on."""
        self.zero3 = zero3
        for member in self.members:
            member.close()
            member.parameter.requires_grad_(True)


def _rows(name: str, parameter: Tensor, prefixes: Sequence[str]) -> tuple[int, int] | None:
    rows = rows_of(name, prefixes)
    if rows is not None and is_sharded(parameter):
        raise InputError(
            f"Rows {rows[0]} to {rows[1]} of {name} cannot be a block: its rows are spread over several processes.",
            advice="Leave max_block_parameters off; sharding makes the largest block smaller already.",
        )
    return rows

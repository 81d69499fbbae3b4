"""Which block is active, what belongs to it, and switching to the next one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from badam import phases
from badam.blocks.names import Block, belongs, rows_of
from badam.blocks.schedule import BlockSchedule
from badam.errors import InputError
from badam.optim.active_parameter import HAS_GRAD_DTYPE, ActiveParameter
from badam.optim.base import VisitingOptimizer, rounding_seed_of
from badam.optim.master_groups import MasterGroups
from badam.optim.messages import Messages
from badam.optim.model_blocks import BlocksOfModel, freeze
from badam.optim.ranks import OneProcess
from badam.tensors.dtensor import is_sharded, seed_of_shard
from badam.vocabulary import Phase, SwitchMode, WriteBack

if TYPE_CHECKING:
    from badam.distributed.deepspeed.adapter import ZeroThree


class BlockVisits(VisitingOptimizer):
    """The part of :class:`badam.BlockOptimizer` that goes from block to block.

    Args:
        base: the base optimizer; its groups and state become this optimizer's own.
        model: the model's parameters and blocks.
        schedule: the order of visits.
        write_back: how masters are rounded into the model when a block is left.
        hide_gradients: take gradients out of ``parameter.grad``.
        keep_dtype: leave a hidden gradient of one batch in the model's type.
        messages: where to announce blocks.
        ranks: the processes that train this model together.
    """

    def __init__(
        self,
        base: MasterGroups,
        model: BlocksOfModel,
        schedule: BlockSchedule,
        *,
        write_back: WriteBack,
        hide_gradients: bool,
        keep_dtype: bool,
        messages: Messages,
        ranks: OneProcess,
    ) -> None:
        self.named_parameters_list = model.named_parameters
        self.blocks = model.blocks
        self.active_modules = model.always
        self.schedule = schedule
        self.write_back = write_back
        self._base = base
        self._model = model
        self._hide_gradients = hide_gradients
        self._keep_dtype = keep_dtype
        self._ranks = ranks
        self._zero3: ZeroThree | None = None
        self._user_groups = [list(group["params"]) for group in base.base.param_groups]
        self._active: list[ActiveParameter] = []
        super().__init__(base.base.param_groups, base.base.defaults, base=base.base, messages=messages)
        base.forget()
        self._begin_visit()
        self._announce(None)

    # What is active

    @property
    def base_optimizer(self) -> Optimizer:
        """The optimizer that runs inside a block."""
        return self._base.base

    @property
    def block_num(self) -> int:
        """D, the number of blocks."""
        return len(self.blocks)

    @property
    def block_prefix_list(self) -> list[list[str]]:
        """The prefixes of each block."""
        return [list(block.prefixes) for block in self.blocks]

    @property
    def switch_mode(self) -> SwitchMode:
        """The order of visits."""
        return self.schedule.mode

    @property
    def switch_block_every(self) -> int:
        """K, the steps of one visit."""
        return self.schedule.switch_every

    @property
    def current_block_idx(self) -> int:
        """The index of the active block."""
        return self.schedule.block_at(self.visit)

    @property
    def current_block(self) -> Block:
        """The active block."""
        return self.blocks[self.current_block_idx]

    @property
    def active_param_prefixs(self) -> list[str]:
        """The prefixes of everything that is active now."""
        return [*self.current_block.prefixes, *self.active_modules]

    @property
    def trained_names(self) -> list[str]:
        """Names of the parameters that are active in one visit or another."""
        prefixes = [*(prefix for block in self.blocks for prefix in block.prefixes), *self.active_modules]
        return [name for name, _ in self._model.trainable if belongs(name, prefixes)]

    @property
    def active_parameters(self) -> tuple[ActiveParameter, ...]:
        """The parameters of the active block, with their masters and gradients."""
        return tuple(self._active)

    @property
    def hides_gradients(self) -> bool:
        """Whether gradients are kept here and not in ``parameter.grad``, so that only this object can clip them."""
        return any(member.hides_gradient for member in self._active)

    @property
    def param_idx2lp(self) -> dict[int, Tensor]:
        """Active parameters of the model by their index in ``named_parameters_list``."""
        index = self._index_by_name()
        return {index[member.name]: member.parameter for member in self._active}

    @property
    def param_idx2hp(self) -> dict[int, Tensor]:
        """fp32 masters by the same index; empty until the first step of a visit, which makes them."""
        index = self._index_by_name()
        return {index[member.name]: member.master for member in self._active if member.master is not None}

    @property
    def masters(self) -> dict[str, Tensor]:
        """The fp32 copies that exist now, by parameter name; a parameter that needs no copy has none."""
        return {m.name: m.master for m in self._active if m.master is not None and m.is_copied}

    # Changing it

    @torch.no_grad()
    def switch_trainable_params(self, verbose: int | None = None) -> None:
        """End the visit now and begin the next one; ``step`` calls this after K steps.

        Everything of the old block is released before anything of the new one is made.
        """
        with phases.within(Phase.SWITCH):
            self._base.forget()
            self.write_back_block()
            self._end_visit()
            self.visit += 1
            self.steps_in_visit = 0
            self._ranks.check_same({"the block to train next": (self.visit, self.current_block.name, self.global_step)})
            self._begin_visit()
        self._announce_switch(verbose)

    @torch.no_grad()
    def write_back_block(self) -> None:
        """Round the active block's masters into the model as if the block were left; the masters stay.

        At the end of training this gives the last block the same treatment as all others. Weights that were loaded
        into the model since the last step are not overwritten.
        """
        if self.write_back == "nearest":  # the weights are that already, after every step
            return
        if self._zero3 is not None:
            self._zero3.round_stochastically()
            return
        generators: dict[tuple[torch.device, int], torch.Generator] = {}
        for member in self._active:
            device, shard = member.parameter.device, member.shard_number
            if (device, shard) not in generators:
                seed = seed_of_shard(self.rounding_seed(), shard)
                generators[device, shard] = torch.Generator(device).manual_seed(seed)
            member.write_stochastically(generators[device, shard])

    def _begin_visit(self) -> None:
        prefixes = self.active_param_prefixs
        for name, parameter in self._model.trainable:
            if belongs(name, prefixes):
                self._active.append(ActiveParameter(name, parameter, self._rows(name, parameter)))
        active = {member.name for member in self._active}
        for name, parameter in self.named_parameters_list:
            if name not in active and name not in self._model.frozen:
                freeze(parameter)
        if self._zero3 is not None:
            for member in self._active:
                member.parameter.requires_grad_(True)
            self._zero3.enter_block()
            return
        # FSDP2 rounds what it has summed to the parameter's type; several batches are added up in fp32 here.
        hidden = (
            self._hide_gradients
            or self._ranks.averages
            or any(
                member.rows or member.is_sharded or (member.is_copied and not HAS_GRAD_DTYPE) for member in self._active
            )
        )
        for member in self._active:
            member.collect(visible=not hidden, keep_dtype=self._keep_dtype, ready=self._on_gradient)

    def _rows(self, name: str, parameter: Tensor) -> tuple[int, int] | None:
        rows = rows_of(name, self.active_param_prefixs)
        if rows is not None and is_sharded(parameter):
            raise InputError(
                f"Rows {rows[0]} to {rows[1]} of {name} cannot be a block: its rows are spread over several processes.",
                advice="Leave max_block_parameters off; sharding makes the largest block smaller already.",
            )
        return rows

    def _end_visit(self) -> None:
        if self._zero3 is not None:
            self._zero3.leave_block()
        for member in self._active:
            member.close()
            freeze(member.parameter)
        self._active = []

    # Driven by DeepSpeed

    @property
    def ds_optimizer(self) -> Any:
        """DeepSpeed's ZeRO-3 optimizer around this one, if there is one; to be set after ``deepspeed.initialize``."""
        return None if self._zero3 is None else self._zero3.engine

    @ds_optimizer.setter
    def ds_optimizer(self, engine: Any) -> None:
        if engine is None or engine is self.ds_optimizer:
            return
        from badam.distributed.deepspeed.adapter import ZeroThree
        from badam.distributed.deepspeed.hooks import follow_checkpoints

        for member in self._active:  # gradients, copies and states are DeepSpeed's from here on
            member.close()
            member.parameter.requires_grad_(True)
        self._zero3 = ZeroThree(engine, self)
        self._ranks = self._zero3.ranks
        self._user_groups = [group for group in self._user_groups if group]  # DeepSpeed has dropped empty ones
        follow_checkpoints()

    @property
    def driven_by(self) -> ZeroThree | None:
        """The adapter through which DeepSpeed drives this optimizer, if it does."""
        return self._zero3

    def user_groups(self) -> list[list[nn.Parameter]]:
        """The model's parameters by group, as the base optimizer was built on them."""
        return [list(parameters) for parameters in self._user_groups]

    def rounding_seed(self) -> int:
        """The seed of stochastic rounding at the end of this visit."""
        return rounding_seed_of(self.schedule.seed, self.visit)

    def step_is_done(self) -> None:
        """Count a step, and switch when the visit is over."""
        self.global_step += 1
        self.steps_in_visit += 1
        if self.schedule.ends_visit(self.steps_in_visit):
            self.switch_trainable_params()

    def _restart_visit(self, visit: int, steps_in_visit: int) -> None:
        """Move to ``steps_in_visit`` steps into ``visit``, without masters or state and without changing a weight."""
        self._base.forget()
        self._end_visit()
        self.visit, self.steps_in_visit = visit, steps_in_visit
        self._begin_visit()

    def _on_gradient(self, member: ActiveParameter) -> None:
        """The gradient of ``member`` is complete, within backward."""

    # Being an optimizer to the outside

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not supported once built: a parameter that came later would be in no block.

        Raises:
            InputError: always, except while the constructor takes over the user's groups.
        """
        if self._is_built:
            raise InputError(
                "Parameters cannot be added to a BlockOptimizer.",
                advice="Build it after all parameters exist; freeze those that should train later.",
            )
        super().add_param_group(param_group)

    def _index_by_name(self) -> dict[str, int]:
        return {name: index for index, (name, _) in enumerate(self.named_parameters_list)}

    def _announce_switch(self, verbose: int | None = None) -> None:
        self._announce(verbose)
        self._call_switch_hooks()

    def _announce(self, verbose: int | None) -> None:
        text = f"Training block {self.current_block_idx + 1} of {self.block_num}: {self.current_block.name}."
        epoch, position = divmod(self.visit, self.block_num)
        if position == 0 and self.block_num > 1:
            order = ", ".join(str(index + 1) for index in self.schedule.order(epoch))
            text += f" The order of this block epoch is {order}."
        self._messages.say(text, verbose=verbose)
        names = ", ".join(member.name for member in self._active)
        self._messages.say(f"Its parameters: {names}.", verbose=verbose, level=2)

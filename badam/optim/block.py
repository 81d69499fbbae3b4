"""Block coordinate descent around any torch optimizer: one block at a time trains, on fp32 copies of its parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from badam import phases
from badam.blocks.names import Block, belongs
from badam.blocks.schedule import BlockSchedule
from badam.errors import InputError, StateError, check_choice
from badam.optim import driver, host_checks
from badam.optim.active_parameter import ActiveParameter
from badam.optim.base import Messages, VisitingOptimizer, plain_options, rounding_seed_of
from badam.optim.compiled_adamw import CompiledAdamW
from badam.optim.master_groups import MasterGroups
from badam.optim.model_blocks import BlockSpec, blocks_of_model
from badam.optim.ranks import ProcessRanks, ranks_of
from badam.optim.state import (
    NOT_SAVED_BY_1_4,
    BlockProgress,
    check_group_sizes,
    model_digest,
    read_block_state_of_1_4,
)
from badam.optim.visit import ActiveBlock
from badam.tensors.dtensor import is_held_by_deepspeed
from badam.tensors.functional import all_finite
from badam.vocabulary import Phase, SwitchMode, WriteBack

Update = Literal["base", "compiled"]


class BlockOptimizer(VisitingOptimizer):
    """Train a model block by block with ``base_optimizer``, BAdam (arXiv 2404.02827) if that is Adam or AdamW.

    Only the active block has gradients, fp32 masters and optimizer state. A *visit* is ``switch_block_every`` steps
    on one block, and within it the result equals the base optimizer run on fp32 copies, bit for bit; every visit
    starts with fresh state. ``param_groups`` stay the user's: all parameters, in the user's groups, with the options
    and schedules that the user gave them; the base optimizer sees masters in their place for the length of its step.

    Args:
        base_optimizer: any optimizer of torch's interface whose step needs no closure, built on the model's
            parameters.
        named_parameters_list: the model's named parameters; a generator is read to its end.
        block_prefix_list: one list of prefixes (or :class:`badam.blocks.partition.Block`) per block; by default one
            block per layer, found from the module tree. Prefixes match on module boundaries.
        switch_block_every: K, the steps of one visit; 0 or less never switches.
        start_block: the first block; see :class:`badam.blocks.schedule.BlockSchedule`.
        switch_mode: ``random``, ``ascending``, ``descending`` or ``fixed``.
        active_modules: prefixes that are active in every visit, besides its block.
        include_embedding: also make a block of the embedding; only without ``block_prefix_list``.
        include_lm_head: also make a block of the output projection; only without ``block_prefix_list``.
        verbose: 0 says nothing, 1 names each new block, 2 also its parameters.
        log_fn: called with each message; by default they are printed, by rank 0 only.
        ds_zero3_enabled: DeepSpeed's ZeRO-3 will drive this optimizer, so that its checkpoints are read into the block
            that was active; known without being told where DeepSpeed has partitioned the model already.
        write_back: how masters are rounded into the model when a block is left: ``stochastic`` keeps the movement in
            expectation, ``nearest`` loses what is smaller than the model's precision. Between steps of a visit it is
            always nearest, because the master is kept.
        gradient_release: step each parameter as soon as its gradient is complete, within backward, so that no two
            gradients exist at once. No accumulation over batches and no clipping over all parameters is possible.
        update: ``base`` runs the base optimizer; ``compiled`` replaces AdamW's step by one compiled pass that reads
            the gradient in the model's type (fp32 once there are several batches) and writes weight and master.
        max_block_parameters: a block with more entries than this is split into ranges of rows of its matrices.
        seed: of the random order and of stochastic rounding; no other generator is touched.
        average_gradients: several processes hold a whole copy of the model each: average the active block's gradients
            over them, once per step. Nothing else may average them, so do not wrap the model in
            ``DistributedDataParallel``, or hand it to :func:`badam.distributed.average_instead_of_ddp`.

    Parameters that FSDP2 has sharded (``torch.distributed.fsdp.fully_shard``) are recognised: masters, moments and
    gradients are cut like them. Several processes build, step and load together, and what they must agree on (blocks,
    schedule, options, position) is checked: see :class:`badam.errors.RanksDisagree`.

    Raises:
        InputError: for options that contradict each other or the model; the message names the block or prefix.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        named_parameters_list: Iterable[tuple[str, nn.Parameter]],
        block_prefix_list: Sequence[BlockSpec] | None = None,
        switch_block_every: int = 50,
        start_block: int | None = None,
        switch_mode: SwitchMode = "descending",
        active_modules: Sequence[str] = (),
        include_embedding: bool = False,
        include_lm_head: bool = False,
        verbose: int = 1,
        log_fn: Callable[[str], Any] | None = None,
        ds_zero3_enabled: bool | None = None,
        *,
        write_back: WriteBack = "stochastic",
        gradient_release: bool = False,
        update: Update = "base",
        max_block_parameters: int | None = None,
        seed: int = 0,
        average_gradients: bool = False,
    ) -> None:
        check_choice("write_back", write_back, ("stochastic", "nearest"))
        check_choice("update", update, ("base", "compiled"))
        is_compiled = update == "compiled"
        model = blocks_of_model(
            named_parameters_list,
            block_prefix_list,
            [parameter for group in base_optimizer.param_groups for parameter in group["params"]],
            always=active_modules,
            include_embedding=include_embedding,
            include_lm_head=include_lm_head,
            max_parameters=max_block_parameters,
        )
        self.named_parameters_list = model.named_parameters
        self.blocks = model.blocks
        self.active_modules = model.always
        self.schedule = BlockSchedule(switch_mode, switch_block_every, len(model.blocks), seed, start_block)
        self.write_back = write_back
        self.update = update
        self.gradient_release = gradient_release
        self._trainable = model.trainable
        self._user_groups = [list(group["params"]) for group in base_optimizer.param_groups]
        self._released: set[str] = set()
        self._skipped_in_step = False
        self._is_averaged = self._host_is_checked = False
        self._ranks = self._ranks_of_model(average_gradients=average_gradients)
        self._master_groups = CompiledAdamW(base_optimizer) if is_compiled else MasterGroups(base_optimizer)
        self._active = ActiveBlock(
            model,
            hides_gradients=gradient_release or is_compiled or average_gradients,
            keep_dtype=is_compiled,
            on_gradient=self._on_gradient,
        )
        super().__init__(
            base_optimizer.param_groups,
            base_optimizer.defaults,
            base_optimizer=base_optimizer,
            messages=Messages(verbose, log_fn),
        )
        self._master_groups.forget()
        self._active.begin(self.active_param_prefixs)
        self._announce()
        self._check_ranks_agree(self._facts())
        if ds_zero3_enabled or is_held_by_deepspeed(self.named_parameters_list[0][1]):
            driver.follow_checkpoints()

    # The step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the active block from its gradients, release them, and switch when the visit is over.

        A step with a non-finite gradient is skipped: it changes no weight and no state, counts in
        ``non_finite_steps`` and not in the visit. Parameters without a gradient are left as they are.

        Returns:
            What ``closure`` returned, if one is given; it is called once, with gradients enabled.
        """
        if is_held_by_deepspeed(self.named_parameters_list[0][1]):
            return self._step_within_deepspeed()
        self._check_host()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.gradient_release:
            with phases.within(Phase.STEP):
                stepped = self._step_on(self._with_gradient())
            if not stepped:
                return loss
        self._released.clear()
        self._skipped_in_step = False
        self.step_is_done()
        return loss

    def _with_gradient(self) -> list[ActiveParameter]:
        """The members with a gradient, which is that of all processes together."""
        members = self._active.members
        for member in members:
            member.take_gradient()
        if self._ranks is not None and self._ranks.averages and not self._is_averaged:
            used_anywhere = self._ranks.any_of([member.gradient is not None for member in members])
            for member, used in zip(members, used_anywhere, strict=True):
                if used:
                    member.zero_gradient()
            self._ranks.average_([member.gradient for member in members if member.gradient is not None])
            self._is_averaged = True
        return [member for member in members if member.gradient is not None]

    def _step_on(self, members: list[ActiveParameter]) -> bool:
        """One base step on the masters of ``members``; False if a gradient was not finite."""
        self._is_averaged = False
        sums = [total for member in members if (total := member.finiteness()) is not None]
        finite = all_finite(sums) if self._ranks is None else self._ranks.all_finite(sums, self.global_step)
        if finite:
            self._master_groups.step(members)
        else:
            self._skip_non_finite(members)
        return finite

    def _skip_non_finite(self, members: list[ActiveParameter]) -> None:
        self._master_groups.unclip()
        for member in members:
            member.drop_gradient()
        if self._skipped_in_step:  # with gradient_release, by another parameter
            return
        self._skipped_in_step = self.gradient_release
        self.non_finite_steps += 1
        self._messages.say(
            f"Step skipped: a gradient of block {self.current_block.name} is infinite or NaN "
            f"({self.non_finite_steps} skipped so far, {self.global_step} done)."
        )

    def step_is_done(self) -> None:
        """Count a step, and switch when the visit is over."""
        self.global_step += 1
        self.steps_in_visit += 1
        if self.schedule.ends_visit(self.steps_in_visit):
            self.switch_trainable_params()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Release all gradients (or set those that exist to zero)."""
        super().zero_grad(set_to_none)
        self._master_groups.unclip()
        self._is_averaged = False
        for member in self._active.members:
            if set_to_none:
                member.drop_gradient()
            elif member.gradient is not None:
                member.gradient.zero_()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale the gradients of the active block to a joint norm of at most ``max_norm``.

        Returns:
            The norm before, shape (), computed in fp32.

        Raises:
            InputError: with ``gradient_release``, where the gradients are never there together.
        """
        if self.gradient_release:
            raise InputError(
                "gradient_release steps on each gradient as it appears, so they cannot be clipped together.",
                advice="Do not clip, or leave gradient_release off.",
            )
        with phases.within(Phase.STEP):
            gradients = [member.gradient for member in self._with_gradient() if member.gradient is not None]
            return self._master_groups.clip(gradients, max_norm, norm_type)

    @torch.no_grad()
    def _on_gradient(self, member: ActiveParameter) -> None:
        """With ``gradient_release``, step on the gradient of ``member`` now, within backward."""
        if not self.gradient_release:
            return
        if member.name in self._released:
            raise InputError(
                f"The gradient of {member.name} came twice before step(): gradient_release cannot accumulate over "
                "batches.",
                advice="Call step() after every backward(), or leave gradient_release off.",
            )
        self._released.add(member.name)
        with phases.within(Phase.STEP):
            self._step_on([member])

    def _check_host(self) -> None:
        parameter = next((group["params"][0] for group in self.param_groups if group["params"]), None)
        if parameter is not None and parameter is not next(group[0] for group in self._user_groups if group):
            raise host_checks.replaced_parameters()
        if self._host_is_checked:
            return
        self._host_is_checked = True
        changes = self.block_num > 1 and self.switch_block_every > 0 and self.switch_mode != "fixed"
        if changes and self._ranks is None:
            host_checks.check_nobody_averages(self._trainable[0][1])

    # Visits

    @torch.no_grad()
    def switch_trainable_params(self, verbose: int | None = None) -> None:
        """End the visit now and begin the next one; ``step`` calls this after K steps.

        Everything of the old block is released before anything of the new one is made.
        """
        with phases.within(Phase.SWITCH):
            self._master_groups.forget()
            self.write_back_block()
            self._active.end()
            self.visit += 1
            self.steps_in_visit = 0
            self._check_ranks_agree(
                {"the block to train next": (self.visit, self.current_block.name, self.global_step)}
            )
            self._active.begin(self.active_param_prefixs)
        self._announce_switch(verbose)

    @torch.no_grad()
    def write_back_block(self) -> None:
        """Round the active block's masters into the model as if the block were left; the masters stay.

        At the end of training this gives the last block the same treatment as all others. Weights that were loaded
        into the model since the last step are not overwritten.
        """
        if self.write_back == "stochastic":  # to nearest they are rounded after every step
            self._active.write_back(self.rounding_seed())

    def rounding_seed(self) -> int:
        """The seed of stochastic rounding at the end of this visit."""
        return rounding_seed_of(self.schedule.seed, self.visit)

    def _restart_visit(self, visit: int, steps_in_visit: int) -> None:
        """Move to ``steps_in_visit`` steps into ``visit``, without masters or state and without changing a weight."""
        self._master_groups.forget()
        self._active.end()
        self.visit, self.steps_in_visit = visit, steps_in_visit
        self._active.begin(self.active_param_prefixs)

    def _announce_switch(self, verbose: int | None = None) -> None:
        self._announce(verbose)
        self._call_switch_hooks()

    def _announce(self, verbose: int | None = None) -> None:
        text = f"Training block {self.current_block_idx + 1} of {self.block_num}: {self.current_block.name}."
        epoch, position = divmod(self.visit, self.block_num)
        if position == 0 and self.block_num > 1:
            order = ", ".join(str(index + 1) for index in self.schedule.order(epoch))
            text += f" The order of this block epoch is {order}."
        self._messages.say(text, verbose=verbose)
        names = ", ".join(member.name for member in self._active.members)
        self._messages.say(f"Its parameters: {names}.", verbose=verbose, level=2)

    # What is active

    @property
    def base_optimizer(self) -> Optimizer:
        """The optimizer that runs inside a block."""
        return self._master_groups.base_optimizer

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
        return [name for name, _ in self._trainable if belongs(name, prefixes)]

    @property
    def active_parameters(self) -> tuple[ActiveParameter, ...]:
        """The parameters of the active block, with their masters and gradients."""
        return tuple(self._active.members)

    @property
    def hides_gradients(self) -> bool:
        """Whether gradients are kept here and not in ``parameter.grad``, so that only this object can clip them."""
        return any(member.hides_gradient for member in self._active.members)

    @property
    def param_idx2lp(self) -> dict[int, Tensor]:
        """Active parameters of the model by their index in ``named_parameters_list``."""
        index = self._index_by_name()
        return {index[member.name]: member.parameter for member in self._active.members}

    @property
    def param_idx2hp(self) -> dict[int, Tensor]:
        """fp32 masters by the same index; empty until the first step of a visit, which makes them."""
        index = self._index_by_name()
        return {index[member.name]: member.master for member in self._active.members if member.master is not None}

    @property
    def masters(self) -> dict[str, Tensor]:
        """The fp32 copies that exist now, by parameter name; a parameter that needs no copy has none."""
        return {m.name: m.master for m in self._active.members if m.master is not None and m.is_copied}

    def user_groups(self) -> list[list[nn.Parameter]]:
        """The model's parameters by group, as the base optimizer was built on them."""
        return [list(parameters) for parameters in self._user_groups]

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

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit-identically, in plain types and tensors.

        Laid out as torch does (``state`` and ``param_groups``, by position in the user's groups), plus ``badam``.
        """
        if self.ds_optimizer is not None:  # which has put its copies into the groups, and saves them itself
            return {**self.base_optimizer.state_dict(), "badam": self._progress().pack()}
        state, groups = self._master_groups.pack(self._active.members)
        return {"state": state, "param_groups": groups, "badam": self._progress().pack()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; the model's weights are the caller's to load, before or after.

        The schedule (order, K, seed) is the saved one, like learning rates and all other options of the groups.

        A state that badam 1.4 saved is taken as far as it goes, and a warning says what was not in it.

        Raises:
            StateError: if it belongs to another model or partition; nothing is changed then.
        """
        if "badam" not in state_dict:
            self._load_state_of_1_4(state_dict)
            return
        if self.ds_optimizer is not None:
            self._load_within_deepspeed(state_dict)
            return
        saved = self.check_state(state_dict)
        self._go_to(saved)
        self._take_state(saved, state_dict)
        self._check_ranks_agree(self._facts())
        self._announce_switch()

    def check_state(self, state_dict: dict[str, Any]) -> BlockProgress:
        """What ``state_dict``, whose tensors are not looked at, says of the position.

        Raises:
            StateError: if it belongs to another model or partition.
        """
        saved = BlockProgress.unpack(state_dict["badam"])
        saved.check_against(self._progress())
        check_group_sizes(state_dict["param_groups"], [len(group["params"]) for group in self.param_groups])
        return saved

    def position(self) -> dict[str, Any]:
        """The position of the run and what it belongs to, in plain types; see :meth:`go_to`."""
        kept = ("masters", "group_changes")  # tensors, or options of the base optimizer
        return {key: value for key, value in self._progress().pack().items() if key not in kept}

    def go_to(self, position: dict[str, Any]) -> None:
        """Move to where :meth:`position` was taken, without masters and moments; load those of the active block next.

        Raises:
            StateError: if it belongs to another model or partition; nothing is changed then.
        """
        saved = BlockProgress.unpack({**position, "masters": {}, "group_changes": []})
        saved.check_against(self._progress())
        self._go_to(saved)
        self._announce_switch()

    def _go_to(self, saved: BlockProgress) -> None:
        self.schedule, self.global_step, self.non_finite_steps = saved.schedule, saved.step, saved.non_finite_steps
        self._restart_visit(saved.visit, saved.steps_in_visit)

    def _take_state(self, saved: BlockProgress, state_dict: dict[str, Any]) -> None:
        """The active block's masters and the base optimizer's state and options."""
        members = self._active.members
        for member in members:
            if member.name in saved.masters:
                member.load_master(saved.masters[member.name])
        self._master_groups.unpack(members, state_dict["state"], state_dict["param_groups"])
        self._master_groups.unpack_changes(saved.group_changes)
        self._share_with_base()

    def _load_state_of_1_4(self, state_dict: dict[str, Any]) -> None:
        index, old = read_block_state_of_1_4(state_dict, self.blocks, self.active_modules, self._trainable)
        text = f"The optimizer state was written by badam 1.4, which did not save {NOT_SAVED_BY_1_4}. "
        visits = (visit for visit in range(self.block_num) if self.schedule.block_at(visit) == index)
        visit = next(visits, None)
        if visit is None:
            warnings.warn(
                f"{text}Its moments fit no block or several, or one that is never visited, so they are not used: "
                f"training goes on with a fresh visit to {self.current_block.name}.",
                stacklevel=3,
            )
            return
        self._restart_visit(visit, old.steps)
        self.global_step = visit * max(self.switch_block_every, 0) + old.steps
        members, positions = self._active.members, self._master_groups.positions()
        moments = {positions[id(m.parameter)]: old.moments[m.name] for m in members if m.name in old.moments}
        self._master_groups.unpack(members, moments, self._master_groups.pack([])[1])
        self._share_with_base()
        self._announce_switch()
        warnings.warn(
            f"{text}Its moments fit {self.current_block.name} alone and are used there, {old.steps} steps into the "
            "visit; the masters are the model's weights.",
            stacklevel=3,
        )

    def _progress(self) -> BlockProgress:
        return BlockProgress(
            step=self.global_step,
            visit=self.visit,
            steps_in_visit=self.steps_in_visit,
            non_finite_steps=self.non_finite_steps,
            schedule=self.schedule,
            blocks=self.block_prefix_list,
            active_modules=self.active_modules,
            parameters=len(self.named_parameters_list),
            model_digest=model_digest(self.named_parameters_list),
            masters=self.masters,
            group_changes=self._master_groups.pack_changes(),
        )

    # Several processes

    def average_over_processes(self) -> None:
        """Average the active block's gradients from now on, as ``average_gradients`` does. Collective.

        Raises:
            InputError: with ``gradient_release``, or where the parameters are sharded.
            RanksDisagree: if the processes would not train the same.
        """
        if self._ranks is not None and self._ranks.averages:
            return
        ranks = self._ranks_of_model(average_gradients=True)
        assert ranks is not None
        ranks.check_same(self._facts())
        state = self.state_dict()
        self._ranks = ranks
        self._active.hides_gradients = True
        self._restart_visit(self.visit, self.steps_in_visit)
        self._take_state(self.check_state(state), state)

    def _ranks_of_model(self, *, average_gradients: bool) -> ProcessRanks | None:
        ranks = ranks_of([parameter for _, parameter in self._trainable], average_gradients=average_gradients)
        if self.gradient_release and ranks is not None:
            raise InputError(
                "gradient_release updates within backward, where processes cannot check gradients together.",
                advice="Leave gradient_release off: only one block's gradients exist at once.",
            )
        return ranks

    def _check_ranks_agree(self, facts: dict[str, object]) -> None:
        if self._ranks is not None:
            self._ranks.check_same(facts)

    def _facts(self) -> dict[str, object]:
        """What all processes must agree on."""
        return {
            "the model": (len(self.named_parameters_list), model_digest(self.named_parameters_list)),
            "the blocks": (self.block_num, [block.prefixes for block in self.blocks], self.active_modules),
            "the schedule": self.schedule,
            "the position": {"step": self.global_step, "visit": self.visit, "steps in it": self.steps_in_visit},
            "the base optimizer": (type(self.base_optimizer).__name__, plain_options(self.param_groups)),
            "the write-back": self.write_back,
        }

    # Driven by DeepSpeed

    @property
    def ds_optimizer(self) -> Any:
        """DeepSpeed's ZeRO-3 optimizer around this one, if there is one; to be set after ``deepspeed.initialize``."""
        return None if self._active.zero3 is None else self._active.zero3.engine

    @ds_optimizer.setter
    def ds_optimizer(self, engine: Any) -> None:
        if engine is None or engine is self.ds_optimizer:
            return
        zero3 = driver.connect_deepspeed(engine, self)
        self._active.hand_over(zero3)
        self._ranks = zero3.ranks
        self._user_groups = [group for group in self._user_groups if group]  # DeepSpeed has dropped empty ones

    @property
    def driven_by(self) -> driver.ZeroThree | None:
        """The adapter through which DeepSpeed drives this optimizer, if it does."""
        return self._active.zero3

    def _step_within_deepspeed(self) -> None:
        """The base step on what DeepSpeed has put into the groups: its fp32 copies, one sub-group at a time."""
        if self.ds_optimizer is None:
            raise InputError(
                "DeepSpeed drives this optimizer without being connected to it, so blocks would never be switched.",
                advice="Set optimizer.ds_optimizer = engine.optimizer after deepspeed.initialize, or use BAdamCallback "
                "in a Trainer.",
            )
        self.base_optimizer.step()

    def _load_within_deepspeed(self, state_dict: dict[str, Any]) -> None:
        saved = BlockProgress.unpack(state_dict["badam"])
        saved.check_against(self._progress())
        if (saved.visit, saved.steps_in_visit) != (self.visit, self.steps_in_visit):
            raise StateError(
                f"The state was saved {saved.steps_in_visit} steps into visit {saved.visit}; here it is "
                f"{self.steps_in_visit} steps into visit {self.visit}, and DeepSpeed reads only what is trainable now.",
                advice="Load with badam.distributed.load_zero3_checkpoint, which goes there first.",
            )
        self.base_optimizer.load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self._share_with_base()

"""Block coordinate descent around any torch optimizer: one block at a time trains, on fp32 copies of its parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from badam import phases
from badam._active import ActiveParameter
from badam._block_state import Progress, check_groups, model_digest
from badam._blocks_of_model import BlocksOfModel, BlockSpec, blocks_of_model
from badam._master_groups import MasterGroups
from badam._messages import Messages
from badam._ranks import OneProcess, ProcessRanks, ranks_of
from badam._shards import is_held_by_deepspeed
from badam._state_of_1_4 import NOT_SAVED, read_state_of_1_4
from badam._visits import BlockVisits
from badam.compiled_update import CompiledAdamW
from badam.errors import InputError, StateError
from badam.plan import WriteBack
from badam.schedule import BlockSchedule, SwitchMode
from badam.vocabulary import Phase

Update = Literal["base", "compiled"]


class BlockOptimizer(BlockVisits):
    """Train a model block by block with ``base_optimizer``, BAdam (arXiv 2404.02827) if that is Adam or AdamW.

    Only the active block has gradients, fp32 masters and optimizer state. A *visit* is ``switch_block_every`` steps
    on one block, and within it the result equals the base optimizer run on fp32 copies, bit for bit; every visit
    starts with fresh state. ``param_groups`` stay the user's: all parameters, in the user's groups, with the options
    and schedules that the user gave them; the base optimizer sees masters in their place for the length of its step.

    Args:
        base_optimizer: any optimizer of torch's interface whose step needs no closure, built on the model's
            parameters.
        named_parameters_list: the model's named parameters; a generator is read to its end.
        block_prefix_list: one list of prefixes (or :class:`badam.partition.Block`) per block; by default one block
            per layer, found from the module tree. Prefixes match on module boundaries.
        switch_block_every: K, the steps of one visit; 0 or less never switches.
        start_block: the first block; see :class:`badam.schedule.BlockSchedule`.
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
        _check_choice("write_back", write_back, ("stochastic", "nearest"))
        _check_choice("update", update, ("base", "compiled"))
        model = blocks_of_model(
            named_parameters_list,
            block_prefix_list,
            [parameter for group in base_optimizer.param_groups for parameter in group["params"]],
            always=active_modules,
            include_embedding=include_embedding,
            include_lm_head=include_lm_head,
            max_parameters=max_block_parameters,
        )
        self.update = update
        self.gradient_release = gradient_release
        self.non_finite_steps = 0
        self._released: set[str] = set()
        self._skipped_in_step = False
        self._is_averaged = self._host_is_checked = False
        ranks = _ranks_for(model, average_gradients=average_gradients)
        self._check_ranks_suit(ranks)
        super().__init__(
            CompiledAdamW(base_optimizer) if update == "compiled" else MasterGroups(base_optimizer),
            model,
            BlockSchedule(switch_mode, switch_block_every, len(model.blocks), seed, start_block),
            write_back=write_back,
            hide_gradients=gradient_release or update == "compiled",
            keep_dtype=update == "compiled",
            messages=Messages(verbose, log_fn),
            ranks=ranks,
        )
        ranks.check_same(self._facts())
        if ds_zero3_enabled or is_held_by_deepspeed(self.named_parameters_list[0][1]):
            from badam.distributed.zero3_hosts import follow_checkpoints

            follow_checkpoints()

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

    def _check_host(self) -> None:
        """Refuse what a host may have done to the model since, under which training would go wrong without a word."""
        first = next((group["params"][0] for group in self.param_groups if group["params"]), None)
        if first is not None and first is not next(group[0] for group in self._user_groups if group):
            raise InputError(
                "The parameters were replaced after this optimizer was built, as accelerate does when it shards a "
                "model: the blocks would be those of the old ones.",
                advice="Turn the host's sharding off: train with badam-train and a plan for the engine fsdp2, or, in a "
                "loop of your own, call badam.distributed.shard_blocks first and build the optimizer after it.",
            )
        if self._host_is_checked:
            return
        self._host_is_checked = True
        changes = self.block_num > 1 and self.switch_block_every > 0 and self.switch_mode != "fixed"
        if changes and not isinstance(self._ranks, ProcessRanks) and torch.distributed.is_initialized():
            from badam.distributed.copies import ddp_wrappers_of

            if ddp_wrappers_of(self._model.trainable[0][1]):
                raise InputError(
                    "DistributedDataParallel averages the gradients of the first block alone: from the second one on "
                    "the processes would train different models.",
                    advice="Call badam.distributed.average_instead_of_ddp(wrapped_model, optimizer) before training, "
                    "or use BAdamCallback in a Trainer.",
                )

    def _step_within_deepspeed(self) -> None:
        """The base step on what DeepSpeed has put into the groups: its fp32 copies, one sub-group at a time."""
        if self.ds_optimizer is None:
            raise InputError(
                "DeepSpeed drives this optimizer, which does not know it: it would never switch blocks.",
                advice="Set optimizer.ds_optimizer = engine.optimizer after deepspeed.initialize, or use BAdamCallback "
                "in a Trainer.",
            )
        self.base_optimizer.step()

    def _with_gradient(self) -> list[ActiveParameter]:
        """The members with a gradient, which is that of all processes together."""
        for member in self._active:
            member.settle()
        if self._ranks.averages and not self._is_averaged:
            present = self._ranks.any_of([member.gradient is not None for member in self._active])
            for member, used in zip(self._active, present, strict=True):
                if used:
                    member.zero_gradient()
            self._ranks.average_([member.gradient for member in self._active if member.gradient is not None])
            self._is_averaged = True
        return [member for member in self._active if member.gradient is not None]

    def _step_on(self, members: list[ActiveParameter]) -> bool:
        """One base step on the masters of ``members``; False if a gradient was not finite."""
        self._is_averaged = False
        if not self._are_finite(members):
            self._skip_non_finite(members)
            return False
        self._base.step(members)
        return True

    def _are_finite(self, members: list[ActiveParameter]) -> bool:
        sums = [total for member in members if (total := member.finiteness()) is not None]
        return self._ranks.all_finite(sums, self.global_step)

    def _skip_non_finite(self, members: list[ActiveParameter]) -> None:
        self._base.unclip()
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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Release all gradients (or set those that exist to zero)."""
        super().zero_grad(set_to_none)
        self._base.unclip()
        self._is_averaged = False
        for member in self._active:
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
            return self._base.clip(gradients, max_norm, norm_type)

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

    # Several processes

    def average_over_processes(self) -> None:
        """Average the active block's gradients from now on, as ``average_gradients`` does. Collective.

        Raises:
            InputError: with ``gradient_release``, or where the parameters are sharded.
            RanksDisagree: if the processes would not train the same.
        """
        if self._ranks.averages:
            return
        ranks = _ranks_for(self._model, average_gradients=True)
        self._check_ranks_suit(ranks)
        ranks.check_same(self._facts())
        state = self.state_dict()
        self._ranks = ranks
        self._restart_visit(self.visit, self.steps_in_visit)
        self._take_state(self.check_state(state), state)

    def _check_ranks_suit(self, ranks: OneProcess) -> None:
        if self.gradient_release and isinstance(ranks, ProcessRanks):
            raise InputError(
                "gradient_release steps within backward, where the processes cannot look at a gradient together.",
                advice="Leave gradient_release off: only one block's gradients exist at once.",
            )

    def _facts(self) -> dict[str, object]:
        """What all processes must agree on."""
        plain = (bool, int, float, str, tuple, type(None))
        options = [
            {key: value for key, value in group.items() if key != "params" and isinstance(value, plain)}
            for group in self.param_groups
        ]
        return {
            "the model": (len(self.named_parameters_list), model_digest(self.named_parameters_list)),
            "the blocks": (self.block_num, [block.prefixes for block in self.blocks], self.active_modules),
            "the schedule": self.schedule,
            "the position": {"step": self.global_step, "visit": self.visit, "steps in it": self.steps_in_visit},
            "the base optimizer": (type(self.base_optimizer).__name__, options),
            "the write-back": self.write_back,
        }

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit-identically, in plain types and tensors.

        Laid out as torch does (``state`` and ``param_groups``, by position in the user's groups), plus ``badam``.
        """
        if self.ds_optimizer is not None:  # which has put its copies into the groups, and saves them itself
            return {**self.base_optimizer.state_dict(), "badam": self._progress().pack()}
        state, groups = self._base.pack(self._active)
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
        self.schedule, self.global_step, self.non_finite_steps = saved.schedule, saved.step, saved.non_finite_steps
        self._restart_visit(saved.visit, saved.steps_in_visit)
        self._take_state(saved, state_dict)
        self._ranks.check_same(self._facts())
        self._announce_switch()

    def _take_state(self, saved: Progress, state_dict: dict[str, Any]) -> None:
        """The active block's masters and the base optimizer's state and options."""
        for member in self._active:
            if member.name in saved.masters:
                member.load_master(saved.masters[member.name])
        self._base.unpack(self._active, state_dict["state"], state_dict["param_groups"])
        self._base.unpack_changes(saved.group_changes)
        self._share_with_base()

    def _load_within_deepspeed(self, state_dict: dict[str, Any]) -> None:
        saved = Progress.unpack(state_dict["badam"])
        saved.check_against(self._progress())
        if (saved.visit, saved.steps_in_visit) != (self.visit, self.steps_in_visit):
            raise StateError(
                f"The state was saved {saved.steps_in_visit} steps into visit {saved.visit}; here it is "
                f"{self.steps_in_visit} steps into visit {self.visit}, and DeepSpeed reads only what is trainable now.",
                advice="Load with badam.distributed.load_zero3_checkpoint, which goes there first.",
            )
        self.base_optimizer.load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self._share_with_base()

    def position(self) -> dict[str, Any]:
        """Where the run stands and what it belongs to, in plain types; see :meth:`go_to`."""
        kept = ("masters", "group_changes")  # tensors, or options of the base optimizer
        return {key: value for key, value in self._progress().pack().items() if key not in kept}

    def go_to(self, position: dict[str, Any]) -> None:
        """Be where :meth:`position` was taken, without masters and moments: the active block's are to be loaded next.

        Raises:
            StateError: if it belongs to another model or partition; nothing is changed then.
        """
        saved = Progress.unpack({**position, "masters": {}, "group_changes": []})
        saved.check_against(self._progress())
        self.schedule, self.global_step, self.non_finite_steps = saved.schedule, saved.step, saved.non_finite_steps
        self._restart_visit(saved.visit, saved.steps_in_visit)
        self._announce_switch()

    def check_state(self, state_dict: dict[str, Any]) -> Progress:
        """What ``state_dict``, whose tensors are not looked at, says of the position.

        Raises:
            StateError: if it belongs to another model or partition.
        """
        saved = Progress.unpack(state_dict["badam"])
        saved.check_against(self._progress())
        check_groups(state_dict["param_groups"], self.param_groups)
        return saved

    def _load_state_of_1_4(self, state_dict: dict[str, Any]) -> None:
        index, old = read_state_of_1_4(state_dict, self.blocks, self.active_modules, self._model.trainable)
        text = f"The optimizer state was written by badam 1.4, which did not save {NOT_SAVED}. "
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
        positions = self._base.positions()
        entries = {positions[id(m.parameter)]: old.entries[m.name] for m in self._active if m.name in old.entries}
        self._base.unpack(self._active, entries, self._base.pack([])[1])
        self._share_with_base()
        self._announce_switch()
        warnings.warn(
            f"{text}Its moments fit {self.current_block.name} alone and are used there, {old.steps} steps into the "
            "visit; the masters are the model's weights.",
            stacklevel=3,
        )

    def _progress(self) -> Progress:
        return Progress(
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
            group_changes=self._base.pack_changes(),
        )


def _ranks_for(model: BlocksOfModel, *, average_gradients: bool) -> OneProcess:
    parameters = [parameter for _, parameter in model.trainable]
    ranks = ranks_of(parameters)
    if not average_gradients:
        return ranks
    if isinstance(ranks, ProcessRanks):
        raise InputError(
            "The parameters are sharded, so FSDP2 averages their gradients already.",
            advice="Leave average_gradients off.",
        )
    if not torch.distributed.is_initialized():
        raise InputError(
            "average_gradients needs the processes to know each other.",
            advice="Call torch.distributed.init_process_group() first.",
        )
    return ProcessRanks(parameters[0].device, averages=True)


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"Unknown {option} {value!r}.", advice=f"Choose one of {', '.join(choices)}.")

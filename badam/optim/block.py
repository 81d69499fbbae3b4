"""Block coordinate descent around any torch optimizer: one block at a time trains, on fp32 copies of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from badam import phases
from badam.blocks.schedule import BlockSchedule
from badam.errors import InputError, check_choice
from badam.optim.active_parameter import ActiveParameter
from badam.optim.compiled_adamw import CompiledAdamW
from badam.optim.master_groups import MasterGroups
from badam.optim.messages import Messages
from badam.optim.model_blocks import BlockSpec, blocks_of_model
from badam.optim.ranks import OneProcess, ProcessRanks, ranks_of
from badam.optim.resumable_blocks import ResumableBlocks
from badam.tensors.dtensor import is_held_by_deepspeed
from badam.vocabulary import Phase, SwitchMode, WriteBack

Update = Literal["base", "compiled"]


class BlockOptimizer(ResumableBlocks):
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
        self._released: set[str] = set()
        self._skipped_in_step = False
        self._is_averaged = self._host_is_checked = False
        ranks = ranks_of([parameter for _, parameter in model.trainable], average_gradients=average_gradients)
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
            from badam.distributed.deepspeed.hooks import follow_checkpoints

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
                advice="Turn the host's sharding off, and build the optimizer on a model that is sharded before: for a "
                "Trainer by from_pretrained(distributed_config=DistributedConfig(fsdp_size=...)), for a loop of your "
                "own by badam.distributed.shard_blocks. Or use badam-train and a plan for the engine fsdp2.",
            )
        if self._host_is_checked:
            return
        self._host_is_checked = True
        changes = self.block_num > 1 and self.switch_block_every > 0 and self.switch_mode != "fixed"
        if changes and not isinstance(self._ranks, ProcessRanks) and torch.distributed.is_initialized():
            from badam.distributed.ddp import ddp_wrappers_of

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
                "DeepSpeed drives this optimizer without being connected to it, so blocks would never be switched.",
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
        ranks = ranks_of([parameter for _, parameter in self._model.trainable], average_gradients=True)
        self._check_ranks_suit(ranks)
        ranks.check_same(self._facts())
        state = self.state_dict()
        self._ranks = ranks
        self._restart_visit(self.visit, self.steps_in_visit)
        self._take_state(self.check_state(state), state)

    def _check_ranks_suit(self, ranks: OneProcess) -> None:
        if self.gradient_release and isinstance(ranks, ProcessRanks):
            raise InputError(
                "gradient_release updates within backward, where processes cannot check gradients together.",
                advice="Leave gradient_release off: only one block's gradients exist at once.",
            )

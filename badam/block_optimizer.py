"""Block coordinate descent around any torch optimizer: one block at a time trains, on fp32 copies of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor, nn
from torch.optim import Optimizer

from badam import phases
from badam._active import HAS_GRAD_DTYPE, ActiveParameter
from badam._block_state import Progress, check_groups, model_digest
from badam._blocks_of_model import (
    BlockSpec,
    check_prefixes,
    check_trainable,
    distinct_parameters,
    given_blocks,
    inferred_blocks,
    parameter_infos,
)
from badam._master_groups import MasterGroups
from badam.compiled_update import CompiledAdamW
from badam.errors import InputError, StateError
from badam.functional import all_finite, clip_factor, clip_gradients_, gradient_norm
from badam.naming import Block, belongs, rows_of
from badam.partition import split_by_rows
from badam.schedule import BlockSchedule, SwitchMode
from badam.vocabulary import Phase

SwitchHook = Callable[["BlockOptimizer"], None]
_FROZEN_HERE = "_frozen_by_badam"


class BlockOptimizer(Optimizer):
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
        ds_zero3_enabled: accepted for callers that pass it; has no effect.
        write_back: how masters are rounded into the model when a block is left: ``stochastic`` keeps the movement in
            expectation, ``nearest`` loses what is smaller than the model's precision. Between steps of a visit it is
            always nearest, because the master is kept.
        gradient_release: step each parameter as soon as its gradient is complete, within backward, so that no two
            gradients exist at once. No accumulation over batches and no clipping over all parameters is possible.
        update: ``base`` runs the base optimizer; ``compiled`` replaces AdamW's step by one compiled pass that reads
            the gradient in the model's type (fp32 once there are several batches) and writes weight and master.
        max_block_parameters: a block with more entries than this is split into ranges of rows of its matrices.
        seed: of the random order and of stochastic rounding; no other generator is touched.

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
        write_back: Literal["stochastic", "nearest"] = "stochastic",
        gradient_release: bool = False,
        update: Literal["base", "compiled"] = "base",
        max_block_parameters: int | None = None,
        seed: int = 0,
    ) -> None:
        _check_choice("write_back", write_back, ("stochastic", "nearest"))
        _check_choice("update", update, ("base", "compiled"))
        self.base_optimizer = base_optimizer
        self.update = update
        self.gradient_release = gradient_release
        self.named_parameters_list = distinct_parameters(named_parameters_list)
        self.active_modules = list(active_modules)
        self.verbose = verbose
        self.log_fn = log_fn
        self.write_back = write_back
        self.ds_optimizer: Any = None
        self.global_step = 0
        self.steps_in_visit = 0
        self.visit = 0
        self.non_finite_steps = 0
        self._switch_hooks: list[SwitchHook] = []
        self._active: list[ActiveParameter] = []
        self._released: set[str] = set()
        self._skipped_in_step = False
        self._clip_factor: Tensor | None = None
        self._base = CompiledAdamW(base_optimizer) if update == "compiled" else MasterGroups(base_optimizer)
        self._is_built = False

        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)
        self._share_with_base()
        self._frozen = _frozen_by_user(self.named_parameters_list)
        if block_prefix_list is None:
            self.blocks = inferred_blocks(
                self.named_parameters_list,
                self._frozen,
                include_embedding=include_embedding,
                include_lm_head=include_lm_head,
            )
        else:
            self.blocks = given_blocks(block_prefix_list, self.named_parameters_list)
        if max_block_parameters is not None:
            infos = parameter_infos(self.named_parameters_list)
            self.blocks = tuple(part for b in self.blocks for part in split_by_rows(b, infos, max_block_parameters))
        check_prefixes(self.active_modules, self.named_parameters_list)
        check_trainable(self.blocks, self.active_modules, self._trainable())
        self.schedule = BlockSchedule(switch_mode, switch_block_every, len(self.blocks), seed, start_block)
        self._begin_visit()
        self._announce(self.verbose)

    # What is active

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
    def active_parameters(self) -> tuple[ActiveParameter, ...]:
        """The parameters of the active block, with their masters and gradients."""
        return tuple(self._active)

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

    def register_switch_hook(self, hook: SwitchHook) -> Callable[[], None]:
        """Call ``hook(self)`` now and whenever another block has become active; returns what removes it again."""
        self._switch_hooks.append(hook)
        hook(self)
        return lambda: self._switch_hooks.remove(hook)

    # The step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the active block from its gradients, release them, and switch when the visit is over.

        A step with a non-finite gradient is skipped: it changes no weight and no state, counts in
        ``non_finite_steps`` and not in the visit. Parameters without a gradient are left as they are.

        Returns:
            What ``closure`` returned, if one is given; it is called once, with gradients enabled.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.gradient_release:
            with phases.within(Phase.STEP):
                stepped = self._step_on([member for member in self._active if member.gradient is not None])
            if not stepped:
                return loss
        self._released.clear()
        self._skipped_in_step = False
        self.global_step += 1
        self.steps_in_visit += 1
        if self.schedule.ends_visit(self.steps_in_visit):
            self.switch_trainable_params()
        return loss

    def _step_on(self, members: list[ActiveParameter]) -> bool:
        """One base step on the masters of ``members``; False if a gradient was not finite."""
        if not self._are_finite(members):
            self._skip_non_finite(members)
            return False
        self._base.step(members, self._clip_factor)
        self._clip_factor = None
        return True

    def _are_finite(self, members: list[ActiveParameter]) -> bool:
        sums = [total for member in members if (total := member.finiteness()) is not None]
        return all_finite(sums)

    def _skip_non_finite(self, members: list[ActiveParameter]) -> None:
        self._clip_factor = None
        for member in members:
            member.drop_gradient()
        if self._skipped_in_step:  # with gradient_release, by another parameter
            return
        self._skipped_in_step = self.gradient_release
        self.non_finite_steps += 1
        self._say(
            f"Step skipped: a gradient of block {self.current_block.name} is infinite or NaN "
            f"({self.non_finite_steps} skipped so far, {self.global_step} done)."
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Release all gradients (or set those that exist to zero)."""
        super().zero_grad(set_to_none)
        self._clip_factor = None
        for member in self._active:
            if set_to_none:
                member.drop_gradient()
            elif member.gradient is not None:
                member.gradient.zero_()

    @property
    def hides_gradients(self) -> bool:
        """Whether gradients are kept here and not in ``parameter.grad``, so that only this object can clip them."""
        return any(member.hides_gradient for member in self._active)

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
            gradients = [member.gradient for member in self._active if member.gradient is not None]
            if self.update == "base":
                return clip_gradients_(gradients, max_norm, norm_type)
            # The compiled pass multiplies in passing; scaling here would round in the model's type.
            norm = gradient_norm(gradients, norm_type)
            if self._clip_factor is not None:
                norm = norm * self._clip_factor
            factor = clip_factor(norm, max_norm)
            self._clip_factor = factor if self._clip_factor is None else factor * self._clip_factor
            return norm

    # The switch

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
            self._begin_visit()
        self._announce_switch(verbose)

    @torch.no_grad()
    def write_back_block(self) -> None:
        """Round the active block's masters into the model as if the block were left; the masters stay.

        At the end of training this gives the last block the same treatment as all others. Weights that were loaded
        into the model since the last step are not overwritten.
        """
        if self.write_back == "stochastic":
            generators: dict[torch.device, torch.Generator] = {}
            for member in self._active:
                device = member.parameter.device
                if device not in generators:
                    generators[device] = torch.Generator(device).manual_seed(self._rounding_seed())
                member.write_stochastically(generators[device])

    def _rounding_seed(self) -> int:
        """Different in every visit and a function of saved numbers only, so that a resumed run rounds alike."""
        return (self.schedule.seed * 0x9E3779B97F4A7C15 + self.visit * 0xD1B54A32D192ED03 + 1) % 2**63

    def _begin_visit(self) -> None:
        prefixes = self.active_param_prefixs
        trainable = {name for name, _ in self._trainable()}
        for name, parameter in self.named_parameters_list:
            if name in trainable and belongs(name, prefixes):
                rows = rows_of(name, prefixes)
                self._active.append(ActiveParameter(name, parameter, rows))
            elif name not in self._frozen:
                _freeze(parameter)
        compiled = self.update == "compiled"
        hidden = compiled or self.gradient_release or any(member.rows for member in self._active)
        for member in self._active:
            member.collect(visible=HAS_GRAD_DTYPE and not hidden, keep_dtype=compiled, ready=self._on_gradient)

    def _end_visit(self) -> None:
        for member in self._active:
            member.close()
            _freeze(member.parameter)
        self._active = []

    @torch.no_grad()
    def _on_gradient(self, member: ActiveParameter) -> None:
        """A hook has taken the gradient of ``member``, within backward."""
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

    # Sharing groups and state with the base optimizer

    def _share_with_base(self) -> None:
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        self.defaults = self.base_optimizer.defaults
        self._is_built = True

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

    def train(self) -> None:
        """Passed on to a base optimizer that knows it (schedule-free ones)."""
        getattr(self.base_optimizer, "train", lambda: None)()

    def eval(self) -> None:
        """Passed on to a base optimizer that knows it (schedule-free ones)."""
        getattr(self.base_optimizer, "eval", lambda: None)()

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit-identically, in plain types and tensors.

        Laid out as torch does (``state`` and ``param_groups``, by position in the user's groups), plus ``badam``.
        """
        state, groups = self._base.pack(self._active)
        return {"state": state, "param_groups": groups, "badam": self._progress().pack()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; the model's weights are the caller's to load, before or after.

        The schedule (order, K, seed) is the saved one, like learning rates and all other options of the groups.

        Raises:
            StateError: if it belongs to another model or partition; nothing is changed then.
        """
        if "badam" not in state_dict:
            raise StateError("This optimizer state was not written by BlockOptimizer.")
        saved = Progress.unpack(state_dict["badam"])
        saved.check_against(self._progress())
        check_groups(state_dict["param_groups"], self.param_groups)
        self._base.forget()
        self._end_visit()
        self.schedule, self.visit, self.steps_in_visit = saved.schedule, saved.visit, saved.steps_in_visit
        self.global_step, self.non_finite_steps = saved.step, saved.non_finite_steps
        self._begin_visit()
        for member in self._active:
            if member.name in saved.masters:
                member.load_master(saved.masters[member.name])
        self._base.unpack(self._active, state_dict["state"], state_dict["param_groups"])
        self._base.unpack_changes(saved.group_changes)
        self._share_with_base()
        self._announce_switch()

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

    # Small things

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters that are the base optimizer's and that the user did not freeze."""
        optimized = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        return [
            (name, parameter)
            for name, parameter in self.named_parameters_list
            if id(parameter) in optimized and name not in self._frozen
        ]

    def _index_by_name(self) -> dict[str, int]:
        return {name: index for index, (name, _) in enumerate(self.named_parameters_list)}

    def _announce_switch(self, verbose: int | None = None) -> None:
        self._announce(self.verbose if verbose is None else verbose)
        for hook in list(self._switch_hooks):
            hook(self)

    def _announce(self, verbose: int) -> None:
        block = self.current_block
        self._say(f"Training block {self.current_block_idx + 1} of {self.block_num}: {block.name}.", verbose)
        if verbose >= 2:
            self._say("Its parameters: " + ", ".join(member.name for member in self._active) + ".", verbose)

    def _say(self, message: str, verbose: int | None = None) -> None:
        if (self.verbose if verbose is None else verbose) < 1:
            return
        if self.log_fn is not None:
            self.log_fn(message)
        elif (
            not torch.distributed.is_available()
            or not torch.distributed.is_initialized()
            or torch.distributed.get_rank() == 0
        ):
            print(message)


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"Unknown {option} {value!r}.", advice=f"Choose one of {', '.join(choices)}.")


def _frozen_by_user(named_parameters: list[tuple[str, nn.Parameter]]) -> set[str]:
    """Names of parameters that are frozen and were not frozen by another BlockOptimizer before this one."""
    return {
        name
        for name, parameter in named_parameters
        if not parameter.requires_grad and not getattr(parameter, _FROZEN_HERE, False)
    }


def _freeze(parameter: nn.Parameter) -> None:
    parameter.requires_grad_(False)
    parameter.grad = None
    setattr(parameter, _FROZEN_HERE, True)

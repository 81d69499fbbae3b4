"""Block coordinate descent where a block is a share of every parameter: AdamW on windows that move over the entries."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from badam import phases
from badam.errors import InputError, check_choice
from badam.optim.base import Messages, VisitingOptimizer, rounding_seed_of
from badam.optim.model_blocks import WindowSizes, distinct_parameters, given_groups, outside_parameters
from badam.optim.state import WindowProgress, check_group_sizes, read_ratio_options_of_1_4
from badam.optim.window import MaskMode, Window, WindowOptions, write_nearest
from badam.optim.window_gradient import WindowGradient
from badam.optim.window_visit import ActiveWindows
from badam.tensors.dtensor import is_held_by_deepspeed, is_sharded
from badam.tensors.functional import adamw_, all_finite, is_fake, non_finite_flags
from badam.vocabulary import Phase, WriteBack

BaseFactory = Callable[[list[dict[str, Any]]], Optimizer]


class BlockOptimizerRatio(VisitingOptimizer):
    """Train a share of every parameter's entries at a time, with AdamW or a base optimizer of the user's.

    The *window* of a parameter is what is trained of it now: a range of the flattened parameter, or entries scattered
    over it. Only windows have fp32 masters, moments and gradients. A *visit* is ``switch_every`` steps with the
    windows where they are; then they move on by their own size, and moments start from zero. Over any number of visits
    every entry is trained equally often, give or take one.

    ``param_groups`` are the user's groups with the windows' masters in place of parameters: 1-D, fp32, with fp32
    gradients, so that schedulers, ``GradScaler`` and clipping act on them. ``parameter.grad`` is a
    :class:`badam.optim.window_gradient.WindowGradient` over the same memory, so that clipping the model's parameters is
    the same thing; the full gradient is released as soon as it is made. ``step`` consumes the gradients.

    Args:
        param_groups: parameters, or groups of them with options (``lr``, ``betas``, ``eps``, ``weight_decay``).
            Frozen parameters stay frozen.
        named_parameters_list: the model's named parameters; a generator is read to its end.
        update_ratio: share of each parameter in its window, above 0 and at most 1.
        verbose: 0 says nothing, 1 announces the start, moves and skipped steps, 2 also each window's size.
        switch_every: steps of one visit; 0 or less never moves.
        preserve_threshold: a parameter with fewer entries is trained as a whole, whatever its ratio.
        param_update_ratios: ratios of single modules, by a part of their path (``q_proj``, ``layers.3``), compared on
            module boundaries; the longest part that matches decides.
        mask_mode: ``adjacent`` or ``scatter``.
        lr, betas, eps, weight_decay: of groups that do not say otherwise; decay is decoupled.
        optimizer_defaults: replaces any of the four by name.
        keep_mask: keep a scattered window's indices (4 B per run) instead of computing them at each use.
        include_embedding, include_lm_head: train these too; else they are frozen. A matrix that both share is
            trained if either is asked for.
        fused: use torch's fused kernel; the default unless ``foreach`` is asked for.
        foreach: use one operator per stage of the update, with temporaries.
        write_back: how masters are rounded into the model when a window is left: ``stochastic`` keeps the movement in
            expectation, ``nearest`` loses what is smaller than the model's precision. Between the steps of a visit it
            is always nearest, because the master is kept.
        seed: of scattered windows and of stochastic rounding; no random generator is touched.
        scatter_run: neighbouring entries that a large scattered window trains together, a power of two; 1 scatters
            single entries, which costs more time and memory traffic.
        gradient_release: update each window as soon as its gradient is there and release that. Excludes accumulation
            over micro-batches, clipping and loss scaling.
        base_optimizer: makes the optimizer that runs on the masters in place of AdamW, from groups that hold the
            user's options and ``lr``: ``torch.optim.SGD``, or a ``functools.partial`` with more options. Rules that
            need a matrix will not do, since a window is a vector.
        log_fn: receives what is said; by default it is printed, by rank 0 only.

    Raises:
        InputError: for options that contradict each other or the model.
    """

    def __init__(
        self,
        param_groups: Iterable[Any],
        named_parameters_list: Iterable[tuple[str, nn.Parameter]],
        update_ratio: float = 0.1,
        verbose: int = 1,
        switch_every: int = 100,
        preserve_threshold: int = 100,
        param_update_ratios: Mapping[str, float | None] | None = None,
        mask_mode: MaskMode = "adjacent",
        lr: float | Tensor = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        optimizer_defaults: Mapping[str, Any] | None = None,
        keep_mask: bool = True,
        include_embedding: bool = False,
        include_lm_head: bool = False,
        *,
        fused: bool | None = None,
        foreach: bool | None = None,
        weight_decay: float = 0.0,
        write_back: WriteBack = "stochastic",
        seed: int = 0,
        scatter_run: int = 16,
        gradient_release: bool = False,
        base_optimizer: BaseFactory | None = None,
        log_fn: Callable[[str], Any] | None = None,
    ) -> None:
        check_choice("mask_mode", mask_mode, ("adjacent", "scatter"))
        check_choice("write_back", write_back, ("stochastic", "nearest"))
        if scatter_run < 1 or scatter_run & (scatter_run - 1):
            raise InputError(
                f"scatter_run is {scatter_run}, which is not a power of two.", advice="Choose 1, 2, 4, 8, 16."
            )
        if fused and foreach:
            raise InputError("fused and foreach exclude each other.", advice="Ask for one of them.")
        named = distinct_parameters(named_parameters_list)
        if any(is_sharded(parameter) or is_held_by_deepspeed(parameter) for _, parameter in named):
            raise InputError(
                "Windows are cut from whole parameters, but these are spread over several processes.",
                advice="Train a sharded model by blocks, with BlockOptimizer.",
            )
        for parameter in outside_parameters(named, include_embedding, include_lm_head):
            parameter.requires_grad_(False)
        self.named_parameters_list = named
        self.update_ratio = update_ratio
        self.switch_every = switch_every
        self.preserve_threshold = preserve_threshold
        self.mask_mode: MaskMode = mask_mode
        self.keep_mask = keep_mask
        self.include_embedding = include_embedding
        self.fused = not foreach if fused is None else fused
        self.write_back = write_back
        self.seed = seed
        self.gradient_release = gradient_release
        self._released: dict[Window, Tensor | None] = {}
        self._active = ActiveWindows(
            named,
            sizes=WindowSizes(update_ratio, preserve_threshold, param_update_ratios or {}, [name for name, _ in named]),
            options=WindowOptions(mask_mode, keep_mask, scatter_run),
        )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **(optimizer_defaults or {})}
        groups = [self._with_masters(group, index) for index, group in enumerate(given_groups(param_groups))]
        if not self.windows:
            raise InputError(
                f"None of the {sum(self._active.given_group_sizes)} parameters in param_groups would be trained: all "
                "are frozen, or belong to the embedding or the output projection.",
                advice="Set requires_grad, or include_embedding and include_lm_head.",
            )
        base = None
        if base_optimizer is not None:
            base = base_optimizer([{"lr": defaults["lr"], **group} for group in groups])
            defaults, groups = base.defaults, base.param_groups
        super().__init__(groups, defaults, base_optimizer=base, messages=Messages(verbose, log_fn))
        self._announce()

    # Gradients

    @torch.no_grad()
    def take_gradient(self, window: Window) -> None:
        """Keep the window of the gradient that autograd has just put at its parameter, and release the rest."""
        gradient = window.parameter.grad
        if gradient is None or (isinstance(gradient, WindowGradient) and gradient.window is window):
            return  # autograd added to the window itself
        window.ready_master()
        values = window.read(gradient)
        del gradient
        if self.gradient_release:
            window.parameter.grad = None
            self._update_now(window, values)
            return
        if window.master.grad is not None:  # the host has cleared the model's gradients, not the optimizer's
            for other in self.windows:
                other.master.grad = other.gradient
        window.set_gradient(values)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Release all gradients (or set those that exist to zero)."""
        if self._released:  # the updates of a backward that no step followed
            self._finish_release()
        for window in self.windows:
            if set_to_none:
                window.drop_gradient()
            elif window.gradient is not None:
                window.gradient.zero_()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale the windows' gradients to a joint norm of at most ``max_norm``.

        Returns:
            The norm before, shape (), in fp32.

        Raises:
            InputError: with ``gradient_release``, which has no moment where all gradients exist.
        """
        if self.gradient_release:
            raise InputError(
                "gradient_release updates each parameter before the norm of all gradients is known.",
                advice="Leave clipping or gradient_release off.",
            )
        with phases.within(Phase.STEP):
            masters = [window.master for window in self.windows if window.gradient is not None]
            return torch.nn.utils.clip_grad_norm_(masters, max_norm, norm_type)

    # The step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all windows that have a gradient, release the gradients, and move on when the visit is over.

        A step with a non-finite gradient is skipped: it changes no weight and no state, counts in
        ``non_finite_steps`` and not in the visit. With ``gradient_release`` only the parameters concerned are.

        Returns:
            What ``closure`` returned, if one is given; it is called once, with gradients enabled.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with phases.within(Phase.STEP):
            stepped = self._finish_release() if self.gradient_release else self._update_all()
        if stepped:
            self.global_step += 1
            self.steps_in_visit += 1
            if 0 < self.switch_every <= self.steps_in_visit:
                self.switch_windows()
        return loss

    def _update_all(self) -> bool:
        windows, gradients = [], []
        for window in self.windows:
            gradient = window.gradient
            if window.master.grad is not gradient:
                window.master.grad = gradient
            if gradient is not None:
                windows.append(window)
                gradients.append(gradient)
        finite = all_finite(gradients)
        if windows and finite:
            self._update(windows, gradients)
            write_nearest(windows)
        for window in self.windows:
            window.drop_gradient()
        if not finite:
            self._count_non_finite(1)
        return bool(windows) and finite

    def _update(self, windows: Sequence[Window], gradients: Sequence[Tensor], found_inf: Tensor | None = None) -> None:
        """One step of the rule on the masters of ``windows``; where ``found_inf`` is positive, of shape (1,), none."""
        if self.base_optimizer is not None:
            self.base_optimizer.step()
            return
        alike: dict[tuple[int, torch.device, int], list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {}
        for window, gradient in zip(windows, gradients, strict=True):
            state = _adamw_state(self.state, window.master)
            state["step"] += 1
            alike.setdefault((window.group, gradient.device, state["step"]), []).append(
                (window.master, gradient, state["exp_avg"], state["exp_avg_sq"])
            )
        for (index, _, step), tensors in alike.items():
            group = self.param_groups[index]
            masters, gradients, exp_avgs, exp_avg_sqs = zip(*tensors, strict=True)
            adamw_(
                masters,
                gradients,
                exp_avgs,
                exp_avg_sqs,
                step=step,
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                maximize=group.get("maximize", False),
                fused=self.fused,
                found_inf=found_inf,
            )

    def _update_now(self, window: Window, gradient: Tensor) -> None:
        """Update one window inside backward; whether its gradient was finite is asked on the device, not awaited."""
        if window in self._released:
            raise InputError(
                f"{window.name} has a second gradient before step(): gradient_release cannot accumulate gradients.",
                advice="Call step() after every backward, or leave gradient_release off.",
            )
        with phases.within(Phase.STEP):
            if self._skips_on_device:
                (flag,) = non_finite_flags([gradient])
            elif all_finite([gradient]):
                flag = None
            else:
                self._released[window] = torch.ones(1)
                return
            self._released[window] = flag
            window.master.grad = gradient
            self._update([window], [gradient], found_inf=flag)
            window.master.grad = None
            write_nearest([window])

    def _finish_release(self) -> bool:
        """Learn which updates were skipped for a non-finite gradient, and take their steps back."""
        released, self._released = self._released, {}
        flags = {w: flag for w, flag in released.items() if flag is not None and not is_fake(flag)}
        device = next(iter(flags.values())).device if flags else None
        found = torch.cat([flag.to(device) for flag in flags.values()]).tolist() if flags else []  # waits once
        skipped = [window for window, value in zip(flags, found, strict=True) if value > 0]
        if skipped and self._skips_on_device:
            for window in skipped:
                self.state[window.master]["step"] -= 1
        if skipped:
            self._count_non_finite(len(skipped))
        return len(released) > len(skipped)

    @property
    def _skips_on_device(self) -> bool:
        """Whether the update itself leaves out windows with a non-finite gradient."""
        return self.fused and self.base_optimizer is None

    def _count_non_finite(self, count: int) -> None:
        self.non_finite_steps += 1
        what = f"the updates of {count} parameters were" if self.gradient_release else "the step was"
        self._messages.say(
            f"A gradient is infinite or NaN: {what} skipped "
            f"({self.non_finite_steps} such steps so far, {self.global_step} done)."
        )

    # Visits

    @torch.no_grad()
    def switch_windows(self) -> None:
        """End the visit now and begin the next one; ``step`` calls this after ``switch_every`` steps."""
        with phases.within(Phase.SWITCH):
            self.state.clear()
            self.write_back_block()
            self._go_to(self.visit + 1, 0)
            for window in self.windows:
                window.ready_master()
        self._messages.say(f"Visit {self.visit + 1}: the windows move on after {self.global_step} steps.")
        self._call_switch_hooks()

    @torch.no_grad()
    def write_back_block(self) -> None:
        """Round the masters into the model as if the windows were left; the masters stay.

        At the end of training this gives the last windows the same treatment as all others. Weights that were loaded
        into the model since the last step are not overwritten.
        """
        if self.write_back == "stochastic":
            self._active.write_back(rounding_seed_of(self.seed, self.visit))

    def _go_to(self, visit: int, steps_in_visit: int) -> None:
        self.visit, self.steps_in_visit = visit, steps_in_visit
        self._active.move(visit, self.seed)

    def _with_masters(self, group: Mapping[str, Any], index: int) -> dict[str, Any]:
        return self._active.with_masters(group, index, visit=self.visit, seed=self.seed, collector=self)

    def _announce(self) -> None:
        numel = sum(window.numel for window in self.windows)
        self._messages.say(
            f"Training {self.active_numel} of {numel} entries at a time ({self.mask_mode}) in "
            f"{len(self.windows)} parameters, moving on every {self.switch_every} steps."
        )
        for window in self.windows:
            self._messages.say(f"  {window.name}: {window.size} of {window.numel}", level=2)

    # What is trained

    @property
    def windows(self) -> list[Window]:
        """The windows, one for each parameter that is trained."""
        return self._active.members

    @property
    def masters(self) -> dict[str, Tensor]:
        """The windows' fp32 masters, by parameter name; not read from the model before the first gradient."""
        return {window.name: window.master for window in self.windows}

    @property
    def active_numel(self) -> int:
        """Entries of all windows together."""
        return sum(window.size for window in self.windows)

    @property
    def block_num(self) -> int:
        """One: every visit trains a part of every layer. For code that handles both optimizers."""
        return 1

    @property
    def current_block_idx(self) -> int:
        """Zero, see :attr:`block_num`."""
        return 0

    @property
    def param_idx2lp(self) -> dict[int, Tensor]:
        """Parameters that have a window, by their index in ``named_parameters_list``."""
        index = {id(parameter): position for position, (_, parameter) in enumerate(self.named_parameters_list)}
        return {index[id(w.parameter)]: w.parameter for w in self.windows if id(w.parameter) in index}

    @property
    def param_idx2hp(self) -> dict[int, Tensor]:
        """Masters by the same index; empty until the first gradient fills them."""
        masters = {id(w.parameter): w.master for w in self.windows if w.is_loaded}
        return {index: masters[id(p)] for index, p in self.param_idx2lp.items() if id(p) in masters}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; their windows join the visit under way."""
        if self._is_built:
            (given,) = given_groups([param_group])
            param_group = self._with_masters(given, len(self.param_groups))
            if self.base_optimizer is not None:
                self.base_optimizer.add_param_group(param_group)
                return
        super().add_param_group(param_group)

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit-identically, in plain types and tensors, which are not copied."""
        own = super().state_dict() if self.base_optimizer is None else self.base_optimizer.state_dict()
        return {**own, "badam_ratio": self._progress().pack()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; the model's weights are the caller's to load, before or after.

        The seed and ``switch_every`` are the saved ones, like learning rates and all other options of the groups. Of
        a state that badam 1.4 wrote, the groups' options are taken; it does not say where its windows were.

        Raises:
            StateError: if it belongs to another model, other windows, or another optimizer; nothing is changed then.
        """
        if "badam_ratio" not in state_dict:
            self._load_options_of_1_4(state_dict)
            return
        saved = WindowProgress.unpack(state_dict["badam_ratio"])
        saved.check_against(self._progress())
        check_group_sizes(state_dict["param_groups"], [len(group["params"]) for group in self.param_groups])
        self.global_step, self.non_finite_steps = saved.step, saved.non_finite_steps
        self.switch_every, self.seed = saved.switch_every, saved.seed
        self._go_to(saved.visit, saved.steps_in_visit)
        for window in self.windows:
            if window.name in saved.masters:
                window.adopt_master(saved.masters[window.name])
        # A copy: two optimizers may continue from one state.
        state = tree_map_only(Tensor, torch.clone, state_dict["state"])
        load = super().load_state_dict if self.base_optimizer is None else self.base_optimizer.load_state_dict
        load({"state": state, "param_groups": state_dict["param_groups"]})
        self._share_with_base()

    def _load_options_of_1_4(self, state_dict: dict[str, Any]) -> None:
        for group, options in zip(
            self.param_groups, read_ratio_options_of_1_4(state_dict, self._active.given_group_sizes), strict=True
        ):
            group.update(options)
        warnings.warn(
            "Loaded the groups' options of a state of badam 1.4. It does not hold the step, the windows' positions or "
            "fp32 masters, so its moments belong to unknown entries: training starts with the first windows and fresh "
            "moments.",
            stacklevel=3,
        )

    def _progress(self) -> WindowProgress:
        base = self.base_optimizer
        return WindowProgress(
            step=self.global_step,
            visit=self.visit,
            steps_in_visit=self.steps_in_visit,
            non_finite_steps=self.non_finite_steps,
            switch_every=self.switch_every,
            seed=self.seed,
            mask_mode=self.mask_mode,
            rule="AdamW" if base is None else type(base).__name__,
            windows=[[window.name, window.numel, window.size, max(1, window.run)] for window in self.windows],
            masters={window.name: window.master.detach() for window in self.windows if window.is_loaded},
        )


def _adamw_state(state: MutableMapping[Tensor, dict[str, Any]], master: Tensor) -> dict[str, Any]:
    """Step number and moments of ``master`` in an optimizer's ``state``; made at its first step in a visit."""
    own = state[master]
    if not own:
        own["step"] = 0
        own["exp_avg"] = torch.zeros_like(master, requires_grad=False)
        own["exp_avg_sq"] = torch.zeros_like(master, requires_grad=False)
    return own

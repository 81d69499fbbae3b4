"""Block coordinate descent where a block is a share of every parameter: AdamW on windows that move over the entries."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from badam import phases
from badam.errors import InputError, check_choice
from badam.optim.messages import Messages
from badam.optim.model_blocks import distinct_parameters
from badam.optim.places import MaskMode
from badam.optim.ratio_parameters import WindowSizes, given_groups, outside_parameters
from badam.optim.ratio_state import WindowProgress, options_of_1_4
from badam.optim.saved_state import check_group_sizes
from badam.optim.window import Window, WindowOptions, write_nearest
from badam.optim.window_gradient import WindowGradient
from badam.optim.window_update import update_windows
from badam.optim.window_visit import BaseFactory, WindowVisits
from badam.tensors.dtensor import is_held_by_deepspeed, is_sharded
from badam.tensors.functional import all_finite, is_fake, non_finite_flags
from badam.vocabulary import Phase, WriteBack


class BlockOptimizerRatio(WindowVisits):
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
        self.update_ratio = update_ratio
        self.preserve_threshold = preserve_threshold
        self.mask_mode: MaskMode = mask_mode
        self.keep_mask = keep_mask
        self.include_embedding = include_embedding
        self.fused = not foreach if fused is None else fused
        self.gradient_release = gradient_release
        self._released: dict[Window, Tensor | None] = {}
        super().__init__(
            given_groups(param_groups),
            named,
            sizes=WindowSizes(update_ratio, preserve_threshold, param_update_ratios or {}, [name for name, _ in named]),
            options=WindowOptions(mask_mode, keep_mask, scatter_run),
            defaults={"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **(optimizer_defaults or {})},
            base_factory=base_optimizer,
            switch_every=switch_every,
            write_back=write_back,
            seed=seed,
            messages=Messages(verbose, log_fn),
        )

    # Gradients

    @torch.no_grad()
    def collect(self, window: Window) -> None:
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
        """One step of the rule on the masters of ``windows``."""
        if self.base_optimizer is not None:
            self.base_optimizer.step()
            return
        update_windows(windows, gradients, self.param_groups, self.state, fused=self.fused, found_inf=found_inf)

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
        for group, options in zip(self.param_groups, options_of_1_4(state_dict, self.given_group_sizes), strict=True):
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

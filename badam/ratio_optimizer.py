"""Block coordinate descent where a block is a share of every parameter: AdamW on windows that move over the entries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.optim import Optimizer

from badam import phases
from badam._blocks_of_model import distinct_parameters
from badam._places import MaskMode
from badam._ratio_parameters import WindowSizes, given_groups, outside_parameters
from badam._ratio_state import pack_state, unpack_state
from badam._window import Window, collect_gradients, write_nearest
from badam._window_update import update_windows
from badam.errors import InputError
from badam.functional import all_finite, is_fake, non_finite_flags
from badam.plan import WriteBack
from badam.ratio_gradient import WindowGradient
from badam.vocabulary import Phase

BaseFactory = Callable[[list[dict[str, Any]]], Optimizer]


class BlockOptimizerRatio(Optimizer):
    """Train a share of every parameter's entries at a time, with AdamW or a base optimizer of the user's.

    The *window* of a parameter is what is trained of it now: a range of the flattened parameter, or entries scattered
    over it. Only windows have fp32 masters, moments and gradients. A *visit* is ``switch_every`` steps with the
    windows where they are; then they move on by their own size, and moments start afresh. Over any number of visits
    every entry is trained equally often, give or take one.

    ``param_groups`` are the user's groups with the windows' masters in place of parameters: 1-D, fp32, with fp32
    gradients, so that schedulers, ``GradScaler`` and clipping act on them. ``parameter.grad`` is a
    :class:`badam.ratio_gradient.WindowGradient` over the same memory, so that clipping the model's parameters is the
    same thing; the full gradient is released as soon as it is made. ``step`` consumes the gradients.

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
        _check_choice("mask_mode", mask_mode, ("adjacent", "scatter"))
        _check_choice("write_back", write_back, ("stochastic", "nearest"))
        if scatter_run < 1 or scatter_run & (scatter_run - 1):
            raise InputError(
                f"scatter_run is {scatter_run}, which is no power of two.", advice="Choose 1, 2, 4, 8, 16."
            )
        if fused and foreach:
            raise InputError("fused and foreach exclude each other.", advice="Ask for one of them.")
        self.named_parameters_list = distinct_parameters(named_parameters_list)
        self.update_ratio = update_ratio
        self.verbose = verbose
        self.switch_every = switch_every
        self.preserve_threshold = preserve_threshold
        self.mask_mode: MaskMode = mask_mode
        self.keep_mask = keep_mask
        self.include_embedding = include_embedding
        self.fused = not foreach if fused is None else fused
        self.write_back = write_back
        self.seed = seed
        self.scatter_run = scatter_run
        self.gradient_release = gradient_release
        self.log_fn = log_fn
        self.global_step = 0
        self.visit = 0
        self.steps_in_visit = 0
        self.non_finite_steps = 0
        self.windows: list[Window] = []
        self.base_optimizer: Optimizer | None = None
        self._released: dict[Window, Tensor | None] = {}

        names = {id(parameter): name for name, parameter in self.named_parameters_list}
        self._sizes = WindowSizes(update_ratio, preserve_threshold, param_update_ratios or {}, names.values())
        for parameter in outside_parameters(self.named_parameters_list, include_embedding, include_lm_head):
            parameter.requires_grad_(False)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **(optimizer_defaults or {})}
        given = given_groups(param_groups)
        self.given_group_sizes = [len(group["params"]) for group in given]
        groups = [self._with_masters(group, index, names) for index, group in enumerate(given)]
        if not self.windows:
            raise InputError(
                f"None of the {sum(self.given_group_sizes)} parameters in param_groups would be trained: all are "
                "frozen, or belong to the embedding or the output projection.",
                advice="Set requires_grad, or include_embedding and include_lm_head.",
            )
        if base_optimizer is not None:
            self.base_optimizer = base_optimizer([{"lr": defaults["lr"], **group} for group in groups])
            defaults, groups = self.base_optimizer.defaults, self.base_optimizer.param_groups
        self._is_built = False
        super().__init__(groups, defaults)
        self._is_built = True
        self.share_with_base()
        self._announce()

    # What is trained

    @property
    def masters(self) -> dict[str, Tensor]:
        """The windows' fp32 masters, by parameter name; not read from the model before the first gradient."""
        return {window.name: window.master for window in self.windows}

    @property
    def active_entries(self) -> int:
        """Entries of all windows together."""
        return sum(window.size for window in self.windows)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; their windows join the visit under way."""
        if self._is_built:
            names = {id(parameter): name for name, parameter in self.named_parameters_list}
            (given,) = given_groups([param_group])
            self.given_group_sizes.append(len(given["params"]))
            param_group = self._with_masters(given, len(self.param_groups), names)
            if self.base_optimizer is not None:
                self.base_optimizer.add_param_group(param_group)
                return
        super().add_param_group(param_group)

    def _with_masters(self, group: Mapping[str, Any], index: int, names: Mapping[int, str]) -> dict[str, Any]:
        """The group with a window's master for each parameter that is not frozen."""
        known = {id(window.parameter) for window in self.windows}
        masters = []
        for position, parameter in enumerate(group["params"]):
            name = names.get(id(parameter), f"param_groups[{index}].params[{position}]")
            if id(parameter) in known:
                raise InputError(f"The parameter {name} is in param_groups twice.", advice="List it once.")
            known.add(id(parameter))
            if not parameter.requires_grad:
                continue
            size = self._sizes.of(name, parameter.numel())
            window = Window(
                name,
                parameter,
                size,
                index,
                mask_mode=self.mask_mode,
                keep_index=self.keep_mask,
                longest_run=self.scatter_run,
            )
            window.move(self.visit, self.seed)
            collect_gradients(self, window)
            self.windows.append(window)
            masters.append(window.master)
        return {**group, "params": masters}

    def share_with_base(self) -> None:
        """Let groups, state and defaults be those of the base optimizer, if there is one."""
        if self.base_optimizer is not None:
            self.param_groups = self.base_optimizer.param_groups
            self.state = self.base_optimizer.state
            self.defaults = self.base_optimizer.defaults

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
        skipped = [w for w, flag in released.items() if flag is not None and not is_fake(flag) and flag.item() > 0]
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
        self._say(
            f"A gradient is infinite or NaN: {what} skipped "
            f"({self.non_finite_steps} such steps so far, {self.global_step} done)."
        )

    # The move

    @torch.no_grad()
    def switch_windows(self) -> None:
        """End the visit now and begin the next one; ``step`` calls this after ``switch_every`` steps."""
        with phases.within(Phase.SWITCH):
            self.state.clear()
            self.write_back_block()
            self.go_to(self.visit + 1, 0)
            for window in self.windows:
                window.ready_master()
        self._say(f"Visit {self.visit + 1}: the windows have moved on after {self.global_step} steps.")

    @torch.no_grad()
    def write_back_block(self) -> None:
        """Round the masters into the model as if the windows were left; the masters stay.

        At the end of training this gives the last windows the same treatment as all others. Weights that were loaded
        into the model since the last step are not overwritten.
        """
        if self.write_back != "stochastic":
            return
        generators: dict[torch.device, torch.Generator] = {}
        for window in self.windows:
            device = window.parameter.device
            if device not in generators:
                generators[device] = torch.Generator(device).manual_seed(self._rounding_seed())
            window.write_stochastically(generators[device])

    def go_to(self, visit: int, steps_in_visit: int) -> None:
        """Place the windows ``steps_in_visit`` steps into ``visit``, without reading masters or touching a weight."""
        self.visit, self.steps_in_visit = visit, steps_in_visit
        for window in self.windows:
            window.drop_gradient()
            window.move(visit, self.seed)

    def _rounding_seed(self) -> int:
        """Different in every visit and a function of saved numbers only, so that a resumed run rounds alike."""
        return (self.seed * 0x9E3779B97F4A7C15 + self.visit * 0xD1B54A32D192ED03 + 1) % 2**63

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit-identically, in plain types and tensors, which are not copied."""
        return pack_state(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; the model's weights are the caller's to load, before or after.

        Of a state that badam 1.4 wrote, the groups' options are taken; it does not say where its windows were.

        Raises:
            StateError: if it belongs to another model, other windows, or another optimizer.
        """
        unpack_state(self, state_dict)

    def own_state_dict(self) -> dict[str, Any]:
        """The rule's state and the groups' options, as torch lays them out."""
        return super().state_dict() if self.base_optimizer is None else self.base_optimizer.state_dict()

    def load_own_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The reverse of :meth:`own_state_dict`."""
        if self.base_optimizer is None:
            super().load_state_dict(state_dict)
        else:
            self.base_optimizer.load_state_dict(state_dict)
            self.share_with_base()

    # Small things

    def train(self) -> None:
        """Passed on to a base optimizer that knows it (schedule-free ones)."""
        getattr(self.base_optimizer, "train", lambda: None)()

    def eval(self) -> None:
        """Passed on to a base optimizer that knows it (schedule-free ones)."""
        getattr(self.base_optimizer, "eval", lambda: None)()

    def _announce(self) -> None:
        entries = sum(window.numel for window in self.windows)
        self._say(
            f"Training {self.active_entries} of {entries} entries at a time ({self.mask_mode}) in {len(self.windows)} "
            f"parameters, moving on every {self.switch_every} steps."
        )
        if self.verbose >= 2:
            for window in self.windows:
                self._say(f"  {window.name}: {window.size} of {window.numel}")

    def _say(self, message: str) -> None:
        if self.verbose < 1:
            return
        if self.log_fn is not None:
            self.log_fn(message)
            return
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not distributed or torch.distributed.get_rank() == 0:
            print(message)


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"Unknown {option} {value!r}.", advice=f"Choose {' or '.join(choices)}.")

"""Which windows there are, where they are now, and moving them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from badam import phases
from badam.errors import InputError
from badam.optim.base import VisitingOptimizer, rounding_seed_of
from badam.optim.messages import Messages
from badam.optim.ratio_parameters import WindowSizes, given_groups
from badam.optim.window import Window, WindowOptions, collect_gradients
from badam.vocabulary import Phase, WriteBack

BaseFactory = Callable[[list[dict[str, Any]]], Optimizer]


class WindowVisits(VisitingOptimizer):
    """The part of :class:`badam.BlockOptimizerRatio` that goes from visit to visit.

    Args:
        groups: the user's parameter groups.
        named_parameters: of the model, each once.
        sizes: of the windows.
        options: of the windows.
        defaults: options of groups that do not say otherwise.
        base_factory: makes the base optimizer from groups of masters; None for AdamW.
        switch_every: steps of one visit; 0 or less never moves.
        write_back: how masters are rounded into the model when a window is left.
        seed: of scattered windows and of stochastic rounding.
        messages: where to announce visits.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        named_parameters: list[tuple[str, nn.Parameter]],
        *,
        sizes: WindowSizes,
        options: WindowOptions,
        defaults: dict[str, Any],
        base_factory: BaseFactory | None,
        switch_every: int,
        write_back: WriteBack,
        seed: int,
        messages: Messages,
    ) -> None:
        self.named_parameters_list = named_parameters
        self.switch_every = switch_every
        self.write_back = write_back
        self.seed = seed
        self.windows: list[Window] = []
        self.given_group_sizes: list[int] = []
        self._sizes = sizes
        self._options = options

        masters = [self._with_masters(group, index) for index, group in enumerate(groups)]
        if not self.windows:
            raise InputError(
                f"None of the {sum(self.given_group_sizes)} parameters in param_groups would be trained: all are "
                "frozen, or belong to the embedding or the output projection.",
                advice="Set requires_grad, or include_embedding and include_lm_head.",
            )
        base = None
        if base_factory is not None:
            base = base_factory([{"lr": defaults["lr"], **group} for group in masters])
            defaults, masters = base.defaults, base.param_groups
        super().__init__(masters, defaults, base=base, messages=messages)
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

    def collect(self, window: Window) -> None:
        """Take the gradient that autograd has just put at the window's parameter."""
        raise NotImplementedError

    # The move

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
        if self.write_back != "stochastic":
            return
        generators: dict[torch.device, torch.Generator] = {}
        for window in self.windows:
            device = window.parameter.device
            if device not in generators:
                generators[device] = torch.Generator(device).manual_seed(rounding_seed_of(self.seed, self.visit))
            window.write_stochastically(generators[device])

    def _go_to(self, visit: int, steps_in_visit: int) -> None:
        """Place the windows ``steps_in_visit`` steps into ``visit``, without reading masters or touching a weight."""
        self.visit, self.steps_in_visit = visit, steps_in_visit
        for window in self.windows:
            window.drop_gradient()
            window.move(visit, self.seed)

    # Masters in the place of parameters

    def _with_masters(self, group: Mapping[str, Any], index: int) -> dict[str, Any]:
        """The group with a window's master for each parameter that is not frozen."""
        names = {id(parameter): name for name, parameter in self.named_parameters_list}
        known = {id(window.parameter) for window in self.windows}
        masters = []
        for position, parameter in enumerate(group["params"]):
            name = names.get(id(parameter), f"param_groups[{index}].params[{position}]")
            if id(parameter) in known:
                raise InputError(f"The parameter {name} is in param_groups twice.", advice="List it once.")
            known.add(id(parameter))
            if parameter.requires_grad:
                size = self._sizes.of(name, parameter.numel())
                window = Window(name, parameter, size, index, self._options)
                window.move(self.visit, self.seed)
                collect_gradients(self, window)
                self.windows.append(window)
                masters.append(window.master)
        self.given_group_sizes.append(len(group["params"]))
        return {**group, "params": masters}

    def _announce(self) -> None:
        entries = sum(window.numel for window in self.windows)
        self._messages.say(
            f"Training {self.active_entries} of {entries} entries at a time ({self._options.mask_mode}) in "
            f"{len(self.windows)} parameters, moving on every {self.switch_every} steps."
        )
        for window in self.windows:
            self._messages.say(f"  {window.name}: {window.size} of {window.numel}", level=2)

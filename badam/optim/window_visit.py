"""The windows of a model: making one for each parameter, moving them on, writing them back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from badam.errors import InputError
from badam.optim.model_blocks import WindowSizes
from badam.optim.window import Collector, Window, WindowOptions, collect_gradients


class ActiveWindows:
    """The windows that are trained now; :class:`badam.BlockOptimizerRatio` owns them and says where they are.

    Args:
        named_parameters: of the model, each once.
        sizes: of the windows.
        options: of the windows.
    """

    def __init__(
        self,
        named_parameters: list[tuple[str, nn.Parameter]],
        *,
        sizes: WindowSizes,
        options: WindowOptions,
    ) -> None:
        self.members: list[Window] = []
        self.given_group_sizes: list[int] = []
        self._names = {id(parameter): name for name, parameter in named_parameters}
        self._sizes = sizes
        self._options = options

    def with_masters(
        self, group: Mapping[str, Any], index: int, *, visit: int, seed: int, collector: Collector
    ) -> dict[str, Any]:
        """The parameter group with a window's master for each parameter that is not frozen.

        Args:
            group: as the user gave it.
            index: its number.
            visit: the visit under way, which the new windows join.
            seed: of scattered windows.
            collector: takes the gradients, and is not kept alive.

        Raises:
            InputError: if a parameter is in a group already.
        """
        known = {id(window.parameter) for window in self.members}
        masters = []
        for position, parameter in enumerate(group["params"]):
            name = self._names.get(id(parameter), f"param_groups[{index}].params[{position}]")
            if id(parameter) in known:
                raise InputError(f"The parameter {name} is in param_groups twice.", advice="List it once.")
            known.add(id(parameter))
            if parameter.requires_grad:
                window = Window(name, parameter, self._sizes.of(name, parameter.numel()), index, self._options)
                window.move(visit, seed)
                collect_gradients(collector, window)
                self.members.append(window)
                masters.append(window.master)
        self.given_group_sizes.append(len(group["params"]))
        return {**group, "params": masters}

    def move(self, visit: int, seed: int) -> None:
        """Place the windows where ``visit`` trains, without reading masters or touching a weight."""
        for window in self.members:
            window.drop_gradient()
            window.move(visit, seed)

    def write_back(self, seed: int) -> None:
        """Round the masters into the model without bias, drawing from ``seed``; the masters stay."""
        generators: dict[torch.device, torch.Generator] = {}
        for window in self.members:
            device = window.parameter.device
            if device not in generators:
                generators[device] = torch.Generator(device).manual_seed(seed)
            window.write_stochastically(generators[device])

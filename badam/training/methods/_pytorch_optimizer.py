"""pytorch-optimizer's AdaLOMO with the interface that a trainer expects."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_optimizer.optimizer.lomo import AdaLOMO
from torch import nn

from badam.training.methods._fused_backward import StepsInBackward


class FusedAdaLomo(StepsInBackward, AdaLOMO):
    """pytorch-optimizer's AdaLOMO, with its second moments where torch's optimizers have them.

    The library keeps them in dictionaries of its own, by name; ``state`` refers to the same tensors by parameter, so
    that whoever measures memory knows them, and only the library's own are saved.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        AdaLOMO.__init__(self, model, **options)
        self._show_states()

    def initialize_states(self) -> None:
        """Rows and columns of second moments, of every matrix in a stack of experts as of a single one.

        The library's update reads and writes them by their last two dimensions; its own zeros suit matrices alone.
        """
        super().initialize_states()
        for name, parameter in self.model.named_parameters():
            if parameter.ndim > 2:
                *stack, rows, columns = parameter.shape
                self.exp_avg_sq_row[name] = parameter.new_zeros((*stack, rows), dtype=torch.float32)
                self.exp_avg_sq_col[name] = parameter.new_zeros((*stack, columns), dtype=torch.float32)

    def state_dict(self) -> dict[str, Any]:
        """The library's state; without the second mention of each tensor."""
        return {**super().state_dict(), "state": {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a saved state into the tensors that exist."""
        super().load_state_dict(state_dict)
        self._show_states()

    def _show_states(self) -> None:
        kinds = {"exp_avg_sq": self.exp_avg_sq, "row": self.exp_avg_sq_row, "column": self.exp_avg_sq_col}
        for name, parameter in self.model.named_parameters():
            self.state[parameter] = {key: kept[name] for key, kept in kinds.items() if name in kept}

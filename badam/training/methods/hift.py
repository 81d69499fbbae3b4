"""The next block in every step, with the other blocks' states on the host (HiFT, arXiv 2401.15207)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from badam.blocks.names import belongs
from badam.optim.block import BlockOptimizer
from badam.plan import Plan
from badam.training.methods.blocks import BlockCoordinate, block_optimizer
from badam.vocabulary import Method

HOST = torch.device("cpu")
_MASTER = "master"
_SAVED = "hift_host_states"


class HiftOptimizer(BlockOptimizer):
    """A block optimizer whose masters and moments last: when a block is left they go to host memory.

    With ``switch_block_every=1`` each step trains the next block. On a model in host memory nothing is copied.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self.host_states: dict[str, dict[str, Any]] = {}  # by parameter name: master and moments of inactive blocks
        super().__init__(*args, **options)

    @torch.no_grad()
    def switch_trainable_params(self, verbose: int | None = None) -> None:
        """End the visit and begin the next one, with the states that its block had when it was left."""
        self._put_away()
        super().switch_trainable_params(verbose)
        self._take_back()

    def _put_away(self) -> None:
        for member in self.active_parameters:
            if member.master is None:
                continue
            kept = {key: _moved(value, HOST) for key, value in self.state.get(member.master, {}).items()}
            if member.is_copied:
                kept[_MASTER] = member.master.detach().to(HOST)
            self.host_states[member.name] = kept

    def _take_back(self) -> None:
        for member in self.active_parameters:
            kept = self.host_states.pop(member.name, None)
            if kept is None:
                continue
            device = member.parameter.device
            if _MASTER in kept:
                member.adopt_master(nn.Parameter(kept.pop(_MASTER).to(device)))
            self.state[member.ready_master()] = {key: _moved(value, device) for key, value in kept.items()}

    def state_dict(self) -> dict[str, Any]:
        """The block optimizer's state and that of the blocks that are away."""
        return {**super().state_dict(), _SAVED: self.host_states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        super().load_state_dict({key: value for key, value in state_dict.items() if key != _SAVED})
        self.host_states = {
            name: {key: value.clone() if isinstance(value, Tensor) else value for key, value in kept.items()}
            for name, kept in state_dict.get(_SAVED, {}).items()
        }


class Hift(BlockCoordinate):
    """Memory of one block's states on the device, of all on the host."""

    name: ClassVar[Method] = "hift"

    def build_optimizer(self, model: nn.Module, plan: Plan, *, start_block: int | None = None) -> Optimizer:
        """AdamW inside blocks, with states that last."""
        return block_optimizer(HiftOptimizer, model, plan, start_block)

    def resident_states(self, model: nn.Module, plan: Plan, block: int) -> Iterable[tuple[str, str, Tensor]]:
        """Masters and moments of all blocks but ``block``, once each has been visited."""
        here = plan.partition.blocks[block].prefixes
        elsewhere = [prefix for other in plan.partition.blocks for prefix in other.prefixes]
        for name, parameter in model.named_parameters():
            if belongs(name, here) or not belongs(name, elsewhere):
                continue
            copied = parameter.dtype in (torch.bfloat16, torch.float16)
            for key in (*((_MASTER,) if copied else ()), "exp_avg", "exp_avg_sq"):
                yield name, key, torch.empty(parameter.shape, dtype=torch.float32)
            yield name, "step", torch.empty((), dtype=torch.float32)


def _moved(value: Any, device: torch.device) -> Any:
    """A tensor on ``device``; step counters stay where the optimizer wants them."""
    return value.to(device) if isinstance(value, Tensor) and value.ndim else value

"""Two forward passes in place of backward: zeroth-order descent (MeZO, arXiv 2305.17333)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from badam import phases
from badam.plan import Plan
from badam.tensors.functional import round_stochastically_
from badam.training.losses import forward_loss
from badam.training.methods.base import TrainingMethod, parameter_groups
from badam.vocabulary import Method, Phase

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MezoOptimizer(Optimizer):
    """Estimates the slope along one random direction per step, and descends along it.

    The direction z is drawn from a generator seeded by step and never stored: whoever needs it draws it again, one
    parameter at a time. The weights stand at w + e z for the first forward pass, at w - e z for the second; the step
    goes from there to w - lr s z in one movement, rounded stochastically where the model is narrower than fp32, since
    most of these movements are smaller than a unit of the last place.

    Args:
        params: parameters or groups of them with ``lr`` and ``weight_decay``.
        lr: learning rate.
        epsilon: e, how far the weights are moved for the two passes.
        seed: of the directions.
    """

    def __init__(self, params: Iterable[Any], lr: float, epsilon: float, seed: int) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "epsilon": epsilon, "seed": seed, "step": 0})
        self.slope: Tensor | float = 0.0
        self.position = 0  # the weights stand at w + position * epsilon * z

    @torch.no_grad()
    def estimate(self, loss: Callable[[], Tensor]) -> Tensor:
        """Call ``loss`` on both sides of the weights, and add the slope between them to that of this step.

        Returns:
            The mean of both losses, shape ().
        """
        self._move_to(1)
        above = loss()
        self._move_to(-1)
        below = loss()
        self.slope = self.slope + (above - below) / (2 * self.param_groups[0]["epsilon"])
        return (above + below) / 2

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Descend along the direction by the estimated slope, from wherever the weights stand."""
        with phases.within(Phase.STEP):
            for group, parameter, direction, generator in self._directions():
                wide = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
                wide.add_(direction, alpha=-self.position * group["epsilon"])
                wide.mul_(1 - group["lr"] * group["weight_decay"])
                wide.sub_(direction.mul_(self.slope), alpha=group["lr"])
                if wide.dtype == parameter.dtype:
                    parameter.copy_(wide)
                else:
                    round_stochastically_(parameter, wide, generator)
        self.slope, self.position = 0.0, 0
        for group in self.param_groups:
            group["step"] += 1

    def _move_to(self, position: int) -> None:
        distance = position - self.position
        for group, parameter, direction, _ in self._directions():
            parameter.add_(direction, alpha=distance * group["epsilon"])
        self.position = position

    def _directions(self) -> Iterator[tuple[dict[str, Any], nn.Parameter, Tensor, torch.Generator]]:
        """Each parameter with its group, its part of this step's direction (new memory), and the generator of both."""
        first = self.param_groups[0]
        seed = first["seed"] * 0x9E3779B97F4A7C15 + first["step"] * 0xD1B54A32D192ED03
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                # Of its own for each parameter: rounding draws numbers between two directions, perturbing does not.
                generator = torch.Generator(parameter.device).manual_seed((seed + number) % 2**63)
                yield group, parameter, torch.empty_like(parameter).normal_(generator=generator), generator


class Mezo(TrainingMethod):
    """Nothing is kept beside the weights: no graph, no gradients, no states."""

    name: ClassVar[Method] = "mezo"
    clips = False
    keeps_gradients = False

    def build_optimizer(self, model: nn.Module, plan: Plan, *, start_block: int | None = None) -> Optimizer:
        """Zeroth-order descent over all parameters."""
        spec = plan.training.optimizer
        return MezoOptimizer(
            parameter_groups(model, spec.weight_decay),
            lr=spec.learning_rate,
            epsilon=plan.training.options.perturbation,
            seed=plan.schedule.seed,
        )

    def loss(
        self,
        model: PreTrainedModel,
        batch: Mapping[str, Tensor],
        plan: Plan,
        optimizer: Optimizer,
        num_items: Tensor | int | None,
    ) -> Tensor:
        """Both forward passes, without dropout, which would differ between them."""
        assert isinstance(optimizer, MezoOptimizer)
        was_training = model.training
        model.eval()
        try:
            return optimizer.estimate(
                lambda: forward_loss(model, batch, plan.training.loss, num_items=num_items).detach()
            )
        finally:
            model.train(was_training)

    def discard_gradients(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Forget the slope; the weights stay where they were moved to, and the next estimate begins there."""
        assert isinstance(optimizer, MezoOptimizer)
        optimizer.slope = 0.0

    def backward(self, loss: Tensor, optimizer: Optimizer) -> None:
        """Nothing: the slope is known."""

    def state_bytes(self, parameters: int, largest_block: int, blocks: int, *, quantized: int = 0) -> int:
        """2M: the weights alone. Not counted: the direction of the largest matrix."""
        return 2 * parameters

"""What every training method must answer, with the answers that most of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from badam.errors import InputError, require
from badam.plan import Plan
from badam.tensors.dtensor import shape_of
from badam.training.losses import forward_loss
from badam.vocabulary import Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TrainingMethod(ABC):
    """How a method differs from the common run.

    Attributes:
        name: as in plans.
        libraries: modules that must be installed, each with the name to install it by.
        accumulates: whether several micro-batches may make one step.
        clips: whether the gradients exist together, so that their joint norm can be bounded.
        keeps_gradients: whether the optimizer's step finds gradients, as opposed to what backward has done by itself.
        saves_adapters_only: whether adapters alone are saved, and the weights beside them are loaded again to go on.
        trains_one_block: whether nothing but the active block is trained, so the lowest of equal blocks needs most.
        quantizes: whether weights are kept in fewer than 16 bits.
        trains_ends: whether embedding and output projection are trained in every visit.
    """

    name: ClassVar[Method]
    libraries: ClassVar[Mapping[str, str]] = {}
    accumulates: ClassVar[bool] = True
    clips: ClassVar[bool] = True
    keeps_gradients: ClassVar[bool] = True
    saves_adapters_only: ClassVar[bool] = False
    trains_one_block: ClassVar[bool] = False
    quantizes: ClassVar[bool] = False
    trains_ends: ClassVar[bool] = False

    def treats_layers_alike(self, plan: Plan) -> bool:
        """Whether equal layers with equal parameters in the active block do the same, so that few are rehearsed."""
        return True

    def active_blocks(self, plan: Plan, block: int) -> tuple[int, ...]:
        """The blocks that are trained together in the visit which :meth:`rehearsed_plan` begins with ``block``."""
        return (block,)

    def check(self, plan: Plan) -> None:
        """Refuse a plan that asks of the method what it cannot do.

        Raises:
            InputError: with what is missing or contradictory, and what to change.
        """
        require(f"The method {self.name}", self.libraries, extra="train,compare")
        if plan.training.grad_accum > 1 and not self.accumulates:
            raise InputError(
                f"{self.name} updates weights inside backward, so it cannot accumulate {plan.training.grad_accum} "
                "micro-batches into one step.",
                advice="Plan with --grad-accum 1 and a larger --batch-size.",
            )
        if plan.training.optimizer.max_grad_norm and not self.clips:
            raise InputError(
                f"{self.name} never has all gradients together, so it cannot bound their norm by "
                f"{plan.training.optimizer.max_grad_norm:g}.",
                advice="Set max_grad_norm to 0 in the plan.",
            )

    def check_device(self, device: torch.device) -> None:  # noqa: B027
        """Refuse a device that the method cannot train on; the planner does not ask.

        Raises:
            InputError: with the device that it needs.
        """

    def loading_options(self, plan: Plan) -> dict[str, Any]:
        """Options for transformers' ``from_pretrained`` besides type and attention."""
        return {}

    def prepare(self, model: PreTrainedModel, plan: Plan) -> None:  # noqa: B027
        """Change the model's modules where the method needs others; before weights are trained."""

    @abstractmethod
    def build_optimizer(self, model: nn.Module, plan: Plan, *, start_block: int | None = None) -> Optimizer:
        """The method's optimizer over the prepared model.

        Args:
            model: the model to train.
            plan: partition, schedule and optimizer settings.
            start_block: the block to begin with; None leaves it to the schedule.
        """

    def rehearsed_plan(self, plan: Plan, block: int) -> tuple[Plan, int]:
        """The plan with which one visit to ``block`` is rehearsed, and the index of the block in it."""
        return plan.model_copy(
            update={"partition": plan.partition.model_copy(update={"blocks": (plan.partition.blocks[block],)})}
        ), 0

    def loss(
        self,
        model: PreTrainedModel,
        batch: Mapping[str, Tensor],
        plan: Plan,
        optimizer: Optimizer,
        num_items: Tensor | int | None,
    ) -> Tensor:
        """The loss of one micro-batch, ready for :meth:`backward`; see badam.training.losses.forward_loss."""
        return forward_loss(model, batch, plan.training.loss, num_items=num_items)

    def backward(self, loss: Tensor, optimizer: Optimizer) -> None:
        """Gradients of ``loss`` into the parameters, or whatever the method does in their place."""
        loss.backward()

    def resident_states(self, model: nn.Module, plan: Plan, block: int) -> Iterable[tuple[str, str, Tensor]]:
        """Tensors like those that the method keeps in host memory while ``block`` is active: parameter, key, tensor."""
        return ()

    def unnamed_weights(self, model: nn.Module) -> Iterable[tuple[str, Tensor]]:
        """Tensors of the weights that are neither parameters nor buffers, by name."""
        return ()

    def quantized_entries(self, model: nn.Module) -> dict[str, int]:
        """Entries of ``model`` that are kept in fewer than 16 bits, by parameter."""
        return {}

    def trained_entries(self, model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
        """Entries that are trained now, by parameter."""
        return {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}

    def state_bytes(self, parameters: int, largest_block: int, blocks: int, *, quantized: int = 0) -> int:
        """Closed form of what the method keeps from step to step: weights, masters, gradients, optimizer states.

        Formula: bf16 weights, and in each trained entry 16 bytes: fp32 master, gradient and two moments.
        Source: arXiv 2404.02827, section 2.2. Not counted: activations, buffers, temporaries.

        Args:
            parameters: entries of the whole model.
            largest_block: entries trained at a time, at most.
            blocks: D.
            quantized: of ``parameters`` those in fewer bits, see :meth:`quantized_entries`.
        """
        return 2 * parameters + 16 * largest_block

    def discard_gradients(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Forget what the micro-batches of a step have left so far, so that the step can begin anew."""
        optimizer.zero_grad(set_to_none=True)

    def save_besides(self, model: PreTrainedModel, directory: Path) -> None:  # noqa: B027
        """Write into a checkpoint what the method needs to go on from it, besides weights and optimizer."""

    def load(self, model: PreTrainedModel, checkpoint: Path) -> None:
        """Take the weights that ``checkpoint`` holds; asked of methods that keep the base alone."""
        raise NotImplementedError

    def settle(self, optimizer: Optimizer) -> None:  # noqa: B027
        """Write what the optimizer holds into the weights, at the end of training."""

    def finish(self, model: PreTrainedModel) -> None:  # noqa: B027
        """Give ``model`` the modules that it shall be saved with; its weights are final."""


def adamw_options(plan: Plan) -> dict[str, Any]:
    """torch.optim.AdamW's options from a plan."""
    spec = plan.training.optimizer
    return {"lr": spec.learning_rate, "betas": spec.betas, "eps": spec.eps, "fused": spec.fused}


def parameter_groups(model: nn.Module, weight_decay: float, *, trained_only: bool = False) -> list[dict[str, Any]]:
    """Two groups, with and without weight decay: vectors (norms, biases) are not decayed."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad or not trained_only]
    decayed = [parameter for parameter in parameters if len(shape_of(parameter)) > 1]
    exempt = [parameter for parameter in parameters if len(shape_of(parameter)) <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]

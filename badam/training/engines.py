"""What each engine does otherwise: how the model is placed, who steps, how a state is written and read again.

The plan names the engine. accelerate wraps nothing: FSDP2's units are those that the planner has reckoned with, DDP's
reducer would know the first block only, and DeepSpeed is driven from block to block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from badam.errors import InputError
from badam.optim.base import hides_gradients
from badam.optim.block import BlockOptimizer
from badam.plan import Plan
from badam.vocabulary import Engine as EngineName

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from badam.training.methods.base import TrainingMethod

SHARDS = "shards"
"""The part of a checkpoint that all processes write together."""


class Engine:
    """One process, which needs nothing of all this; and the parent of the others."""

    is_for_several: ClassVar[bool] = False  # processes, which write checkpoints together
    optimizer_averages: ClassVar[bool] = False  # gradients over the processes, as opposed to a library

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def build(
        self,
        weights: str | None = None,
        loading: Mapping[str, Any] | None = None,
        *,
        resumes: bool = False,
        tell: Callable[[str], None] = lambda _text: None,
    ) -> PreTrainedModel:
        """The plan's model, see :func:`badam.training.build.build_model`; ``resumes`` if it is read later."""
        from badam.training.build import build_model

        return build_model(self.plan.model, self.plan.training, weights=weights, loading=loading, tell=tell)

    def place(self, model: PreTrainedModel) -> None:
        """Put the built model where it trains, before the trainer sees it."""

    def drive(self, model: PreTrainedModel, optimizer: Optimizer) -> Optimizer:
        """What the trainer shall call in the place of the plan's optimizer."""
        return optimizer

    def backward(self, loss: Tensor, method: TrainingMethod, optimizer: Optimizer, *, is_last: bool) -> None:
        """Backward of one micro-batch; ``is_last`` of an optimizer step."""
        method.backward(loss, optimizer)

    def loss(self, compute: Callable[..., Tensor], model: PreTrainedModel, *args: Any) -> Tensor:
        """``compute(model, *args)``, the loss of one micro-batch, ready for :meth:`backward`."""
        return compute(model, *args)

    def clip(
        self, model: PreTrainedModel, optimizer: Optimizer, max_norm: float, on_norm: Callable[[Tensor], None] | None
    ) -> None:
        """Scale the step's gradients to a joint norm of at most ``max_norm``, if it is not 0; tell what it was."""
        if not max_norm:
            return
        if hides_gradients(optimizer):
            norm = cast(Any, optimizer).clip_grad_norm_(max_norm)
        else:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        if on_norm is not None:
            on_norm(norm)

    def gradient_norm(self) -> float | None:
        """The norm of the last step's gradients, where only the engine knows it."""
        return None

    def evaluated(self, model: PreTrainedModel) -> None:
        """Called after an evaluation."""

    def save(self, directory: Path, model: PreTrainedModel, optimizer: Optimizer) -> None:
        """Write weights and optimizer state into a checkpoint's ``directory``. Collective."""
        raise NotImplementedError("one process saves as transformers does")

    def load(self, directory: Path, model: PreTrainedModel, optimizer: Optimizer) -> None:
        """Read what :meth:`save` wrote, on any number of processes. Collective."""
        raise NotImplementedError("one process loads as transformers does")

    def load_weights(self, directory: Path, model: PreTrainedModel) -> None:
        """Read the weights alone. Collective."""
        raise NotImplementedError("one process loads as transformers does")

    def whole_weights(self, model: PreTrainedModel) -> dict[str, Any] | None:
        """All weights in the first process's host memory, nothing in the others; None for what the model holds."""
        return None


class Copies(Engine):
    """A whole copy in every process; the optimizer averages the active block's gradients."""

    is_for_several = True
    optimizer_averages = True

    def loss(self, compute: Callable[..., Tensor], model: PreTrainedModel, *args: Any) -> Tensor:
        """The mean of the processes' losses, as which their gradients are averaged, is that of all labels."""
        return self._within(compute, model, *args) * dist.get_world_size()

    def _within(self, compute: Callable[..., Tensor], model: PreTrainedModel, *args: Any) -> Tensor:
        """``compute(model, *args)``, where a part of the model that it calls directly is gathered as in a forward."""
        within = getattr(model, "loss_within", None) if self.plan.training.loss == "chunked" else None
        found: Tensor = compute(model, *args) if within is None else within(lambda: compute(model, *args))
        return found

    def save(self, directory: Path, model: PreTrainedModel, optimizer: Optimizer) -> None:
        from badam.distributed import save_checkpoint

        save_checkpoint(directory / SHARDS, model, _blocks(optimizer))

    def load(self, directory: Path, model: PreTrainedModel, optimizer: Optimizer) -> None:
        from badam.distributed import load_checkpoint

        load_checkpoint(directory / SHARDS, model, _blocks(optimizer))

    def load_weights(self, directory: Path, model: PreTrainedModel) -> None:
        from badam.distributed.saving import load_weights

        load_weights(directory / SHARDS, model)

    def whole_weights(self, model: PreTrainedModel) -> dict[str, Any] | None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


class Sharded(Copies):
    """PyTorch's FSDP2: every process keeps its part of each parameter, in one copy of the model or in several."""

    optimizer_averages = False

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._model: Any = None

    def build(
        self,
        weights: str | None = None,
        loading: Mapping[str, Any] | None = None,
        *,
        resumes: bool = False,
        tell: Callable[[str], None] = lambda _text: None,
    ) -> PreTrainedModel:
        """Each process builds the part that it keeps."""

        from badam.distributed.fsdp2 import mesh_of
        from badam.distributed.fsdp2_init import ShardedModelBuilder
        from badam.training.build import build_model

        mesh = mesh_of(self.plan.target.shards)
        device = (
            torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
        )
        return build_model(
            self.plan.model,
            self.plan.training,
            weights=weights,
            loading=loading,
            builder=lambda model_class: ShardedModelBuilder(model_class, mesh, device),
            tell=tell,
        )

    def place(self, model: PreTrainedModel) -> None:
        from torch.distributed.fsdp import register_fsdp_forward_method

        self._model = model
        type(model).loss_within = _loss_within  # of the class that FSDP2 has made for this model
        register_fsdp_forward_method(model, "loss_within")

    def backward(self, loss: Tensor, method: TrainingMethod, optimizer: Optimizer, *, is_last: bool) -> None:
        """The copies of a model add up their gradients once per step, in its last micro-batch."""
        if self.plan.target.replicas > 1:
            self._model.set_requires_all_reduce(is_last)
        method.backward(loss, optimizer)

    def evaluated(self, model: PreTrainedModel) -> None:
        """The root stays gathered after a forward: training would find it so, and a checkpoint would not."""
        cast(Any, model).reshard()


class ZeroThree(Copies):
    """DeepSpeed's ZeRO-3, which partitions the model when the optimizer is there."""

    optimizer_averages = False

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._deepspeed: Any = None

    def build(
        self,
        weights: str | None = None,
        loading: Mapping[str, Any] | None = None,
        *,
        resumes: bool = False,
        tell: Callable[[str], None] = lambda _text: None,
    ) -> PreTrainedModel:
        """No process holds the whole model, but of random weights, which have to be those of one process."""

        from badam.distributed.deepspeed.engine import partitioned_from_the_start

        building: Any = nullcontext()
        if weights is not None or resumes:
            building = partitioned_from_the_start(
                getattr(torch, self.plan.training.dtype),
                initializes=weights is not None,
                offload_parameters=self.plan.target.offload == "all",
            )
        with building:
            return super().build(weights, loading, tell=tell)

    def place(self, model: PreTrainedModel) -> None:
        from badam.distributed.deepspeed.adapter import check_installed

        check_installed()

    def drive(self, model: PreTrainedModel, optimizer: Optimizer) -> Optimizer:
        from badam.distributed.deepspeed.engine import DrivenByDeepSpeed, as_forward, start_zero3

        training = self.plan.training
        self._deepspeed = start_zero3(
            model,
            _blocks(optimizer),
            batch_size=training.batch_size,
            accumulate=training.grad_accum,
            max_grad_norm=training.optimizer.max_grad_norm,
            offload_optimizer=self.plan.target.offload != "none",
            offload_parameters=self.plan.target.offload == "all",
        )
        cast(Any, model).loss_within = functools.partial(as_forward, model)
        return DrivenByDeepSpeed(self._deepspeed, _blocks(optimizer))

    def backward(self, loss: Tensor, method: TrainingMethod, optimizer: Optimizer, *, is_last: bool) -> None:
        """DeepSpeed's; the loss is divided by the labels of the whole step already."""
        from badam.distributed.deepspeed import engine as zero3_engine

        zero3_engine.backward(self._deepspeed, loss, is_last=is_last)

    def clip(
        self, model: PreTrainedModel, optimizer: Optimizer, max_norm: float, on_norm: Callable[[Tensor], None] | None
    ) -> None:
        """Nothing: DeepSpeed clips in its step."""

    def gradient_norm(self) -> float | None:
        norm = self._deepspeed.get_global_grad_norm()
        return None if norm is None else float(norm)

    def save(self, directory: Path, model: PreTrainedModel, optimizer: Optimizer) -> None:
        from badam.distributed import save_zero3_checkpoint

        save_zero3_checkpoint(self._deepspeed, _blocks(optimizer), directory, SHARDS, portable=True)

    def load(self, directory: Path, model: PreTrainedModel, optimizer: Optimizer) -> None:
        from badam.distributed import load_zero3_checkpoint

        load_zero3_checkpoint(self._deepspeed, _blocks(optimizer), directory / SHARDS)

    def load_weights(self, directory: Path, model: PreTrainedModel) -> None:
        from badam.distributed.deepspeed.saving import load_portable_weights

        load_portable_weights(directory / SHARDS, model)

    def whole_weights(self, model: PreTrainedModel) -> dict[str, Any] | None:
        from badam.distributed.deepspeed.saving import gathered_weights

        return gathered_weights(model)


def engine_of(plan: Plan) -> Engine:
    """What runs the plan's engine in this process; one process alone where there is no group of them."""
    if not dist.is_available() or not dist.is_initialized():
        return Engine(plan)
    return kind_of(plan)(plan)


def kind_of(plan: Plan) -> type[Engine]:
    """The class of the plan's engine, for what is true of it in any process."""
    kinds: dict[EngineName, type[Engine]] = {
        "single": Engine,
        "ddp": Copies,
        "fsdp2": Sharded,
        "zero3": ZeroThree,
    }
    return kinds[plan.target.engine]


def check_kind(checkpoint: Path, engine: Engine) -> None:
    """Refuse a checkpoint that the engine cannot read.

    Raises:
        InputError: if one process wrote it and several are here, or the other way round.
    """
    written_together = (checkpoint / SHARDS).is_dir()
    if written_together != engine.is_for_several:
        was = "several processes" if written_together else "one process"
        raise InputError(
            f"{checkpoint} was written by {was}, and the plan is for the engine {engine.plan.target.engine}.",
            advice="Resume with the plan that the run was begun with.",
        )


def _blocks(optimizer: Optimizer) -> BlockOptimizer:
    assert isinstance(optimizer, BlockOptimizer), "several processes train with badam alone"
    return optimizer


def _loss_within(model: Any, compute: Any) -> Any:
    """``compute()``, for which FSDP2 gathers the root's parameters: the chunked loss reaches for the head itself."""
    return compute()

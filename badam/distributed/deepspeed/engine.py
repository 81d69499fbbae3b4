"""A model under DeepSpeed's ZeRO-3 without a host that brings DeepSpeed along: only public interfaces of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from badam.blocks.names import belongs
from badam.blocks.partition import layer_paths
from badam.distributed.deepspeed.adapter import check_installed, without_shared_memory_operator
from badam.distributed.deepspeed.linear import use_for_partitioned
from badam.optim.block import BlockOptimizer
from badam.tensors.dtensor import shape_of


@contextmanager
def partitioned_from_the_start(dtype: torch.dtype, *, initializes: bool, offload_parameters: bool) -> Iterator[None]:
    """Within, transformers builds models that no process ever holds whole: each parameter is taken apart as it comes.

    Weights that are read are read by the first process, from files that are mapped, and dealt out by it. Random ones
    are not for this: transformers would gather the whole model to draw them.

    Args:
        dtype: of the parameters.
        initializes: whether weights that no file has are drawn, as a new head's are; not if all are read later.
        offload_parameters: keep this process's parts in host memory.

    Raises:
        InputError: if DeepSpeed is missing or of a version that is not known.
    """
    check_installed()
    from transformers.initialization import no_init_weights
    from transformers.integrations import HfDeepSpeedConfig

    without_shared_memory_operator(torch.get_default_device())
    stage: dict[str, Any] = {"stage": 3, **({"offload_param": {"device": "cpu"}} if offload_parameters else {})}
    # transformers looks for the configuration as long as the object lives.
    config = HfDeepSpeedConfig(
        {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": stage,
            "bf16": {"enabled": dtype == torch.bfloat16},
        }
    )
    with nullcontext() if initializes else no_init_weights():
        yield
    del config


def numel_of(parameter: Tensor) -> int:
    """Entries of a parameter, partitioned or not."""
    return math.prod(shape_of(parameter))


def start_zero3(
    model: nn.Module,
    optimizer: BlockOptimizer,
    *,
    batch_size: int,
    accumulate: int,
    max_grad_norm: float,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
) -> Any:
    """DeepSpeed's engine around ``model`` and ``optimizer``, which it drives from then on. Collective.

    Args:
        model: all of its parameters in one floating type, bfloat16 or float32; whole, or built in
            :func:`partitioned_from_the_start`.
        optimizer: over its parameters.
        batch_size: sequences of a micro-batch in this process.
        accumulate: micro-batches of an optimizer step.
        max_grad_norm: bound on the norm of all gradients together; 0 leaves them alone.
        offload_optimizer: keep masters and moments in host memory, and step there.
        offload_parameters: keep this process's parts of the parameters in host memory.

    Raises:
        InputError: if DeepSpeed is missing or of a version that is not known.
    """
    check_installed()
    import deepspeed

    parameter = next(model.parameters())
    trained = set(optimizer.trained_names)
    largest = max(numel_of(trainable) for name, trainable in optimizer.named_parameters_list if name in trained)
    without_shared_memory_operator(parameter.device)
    stage = _partitioning(model, largest)
    if offload_optimizer:
        stage["offload_optimizer"] = {"device": "cpu"}
    if offload_parameters:
        stage["offload_param"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": stage,
        "bf16": {"enabled": parameter.dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    optimizer.ds_optimizer = engine.optimizer
    use_for_partitioned()
    return engine


def _partitioning(model: nn.Module, largest: int) -> dict[str, Any]:
    """The settings of ZeRO-3 under which what it holds can be foreseen; ``largest`` is that of the trained tensors."""
    layer = _largest_layer(model)
    return {
        "stage": 3,
        # The buffer that gradients are collected in has the size of the largest; DeepSpeed's own would be a gigabyte.
        "reduce_bucket_size": largest,
        # One layer is gathered ahead, and none is kept from forward to backward: a gigabyte of them would be otherwise.
        "stage3_prefetch_bucket_size": layer,
        "stage3_max_live_parameters": layer,
        "stage3_max_reuse_distance": 0,
        # Norms and biases stay gathered: a message for each would take longer than they are worth.
        "stage3_param_persistence_threshold": max(
            (numel_of(parameter) for parameter in model.parameters() if len(shape_of(parameter)) < 2), default=0
        ),
    }


def _largest_layer(model: nn.Module) -> int:
    """Entries of the largest of the repeated layers; of the whole model if it has none."""
    named = [(name, numel_of(parameter)) for name, parameter in model.named_parameters()]
    paths = layer_paths(name for name, _ in named)
    sizes = (sum(numel for name, numel in named if belongs(name, (path,))) for path in paths)
    return max(sizes, default=sum(numel for _, numel in named))


def as_forward(model: nn.Module, compute: Callable[[], Tensor]) -> Tensor:
    """``compute()`` in the place of the model's forward: DeepSpeed begins a micro-batch where that begins.

    A loss that calls parts of the model would have none of it: nothing gathered in advance, norms gathered every time.
    """
    with patch.object(model, "forward", compute):
        found: Tensor = model()
    return found


def backward(engine: Any, loss: Tensor, *, is_last: bool) -> None:
    """Backward of a loss that was computed without calling the engine: a loss in chunks calls parts of the model.

    Args:
        engine: of :func:`start_zero3`.
        loss: as it is: divided by what the whole optimizer step shall be divided by.
        is_last: whether the optimizer steps next.
    """
    # The engine's forward does this. Without it each micro-batch's gradients replace those before it.
    engine.optimizer.clear_backward_seen_flag()
    engine.set_gradient_accumulation_boundary(is_last)
    engine.backward(loss, scale_wrt_gas=False)


class DrivenByDeepSpeed(Optimizer):
    """What a training loop calls in the place of a block optimizer that DeepSpeed drives: ``step`` is the engine's.

    Args:
        engine: of :func:`start_zero3`.
        optimizer: the block optimizer inside, whose groups and state this object shows.
    """

    def __init__(self, engine: Any, optimizer: BlockOptimizer) -> None:
        self.engine = engine
        self.stands_for = optimizer
        self.defaults = optimizer.defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The block optimizer's."""
        return self.stands_for.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The block optimizer's."""
        return self.stands_for.state

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Clip, update, and switch blocks when the visit is over."""
        self.engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: DeepSpeed lets go of the gradients in its step."""

    def state_dict(self) -> dict[str, Any]:
        """The options of the groups; the state is DeepSpeed's, see save_zero3_checkpoint."""
        plain = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        return {"state": {}, "param_groups": plain}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: a host calls this with what :meth:`state_dict` gave, see load_zero3_checkpoint."""

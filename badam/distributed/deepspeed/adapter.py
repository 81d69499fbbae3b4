"""Block-coordinate training on DeepSpeed ZeRO-3: everything of DeepSpeed's that is not public stands in this file.

DeepSpeed partitions the parameters that are trainable when ``deepspeed.initialize`` is called, and keeps fp32 copies,
moments and gradient buffers for these alone. At every switch the same of its methods that had set them up are called
again for the next block. The switch comes after DeepSpeed's step, when the fp32 copies have been rounded into the
model: inside of it, as badam 1.4 did, the last update of every visit would be lost.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from badam.errors import InputError
from badam.optim.master import HALF_TYPES
from badam.optim.ranks import ProcessRanks
from badam.tensors.dtensor import seed_of_shard, shape_of
from badam.tensors.functional import round_stochastically_

KNOWN_VERSIONS = ("0.19.",)
"""DeepSpeed versions whose private methods are the ones used here; 0.19.8 was run."""


@runtime_checkable
class Driven(Protocol):
    """What DeepSpeed's side needs of a block optimizer, which :class:`badam.BlockOptimizer` has."""

    ds_optimizer: Any

    def user_groups(self) -> list[list[Any]]: ...
    def rounding_seed(self) -> int: ...
    def step_is_done(self) -> None: ...
    def position(self) -> dict[str, Any]: ...
    def go_to(self, position: dict[str, Any]) -> None: ...


class ZeroThree:
    """Drives DeepSpeed's ZeRO-3 optimizer from block to block.

    Args:
        engine: DeepSpeed's ``DeepSpeedZeroOptimizer_Stage3``, which ``deepspeed.initialize`` puts around the block
            optimizer.
        optimizer: the block optimizer inside.

    Raises:
        InputError: if this is another object, or DeepSpeed has a version that is not known here.
    """

    def __init__(self, engine: Any, optimizer: Driven) -> None:
        _check(engine)
        self.engine = engine
        self._optimizer = optimizer
        self.ranks = ProcessRanks(torch.device(engine.device))
        self._original: Callable[..., Any] = engine.step
        engine.step = self._step

    def _step(self, closure: Any = None) -> Any:
        """DeepSpeed's step, and after it the block optimizer's count of it."""
        result = self._original(closure)
        if not self.engine.overflow:
            self._optimizer.step_is_done()
        return result

    def round_stochastically(self) -> None:
        """Round the fp32 copies into the model as the block is left; each process its own part."""
        seed = seed_of_shard(self._optimizer.rounding_seed(), dist.get_rank())
        pairs = zip(self.engine.fp16_partitioned_groups_flat, self.engine.fp32_partitioned_groups_flat, strict=True)
        generators: dict[torch.device, torch.Generator] = {}
        for weights, masters in pairs:
            if weights is not None and weights.dtype in HALF_TYPES and masters.numel() == weights.numel():
                source = masters.detach().to(weights.device)
                generator = generators.setdefault(weights.device, torch.Generator(weights.device).manual_seed(seed))
                round_stochastically_(weights.detach(), source, generator)

    def masters(self) -> list[Tensor]:
        """This process's fp32 copies of the active block, one flat tensor for each of DeepSpeed's sub-groups."""
        return list(self.engine.fp32_partitioned_groups_flat)

    def gradients(self) -> list[Tensor]:
        """What collects this process's gradients, and, where they are offloaded, what the step takes them from."""
        taken = [master.grad for master in self.masters() if master.grad is not None]
        collected = self.engine.grad_partitions_flat_buffer
        return taken if collected is None else [collected, *taken]

    def gathered_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Master and optimizer state of an active parameter, whole; on every process. Collective.

        Returns:
            ``master`` and what the base optimizer keeps per entry, of the parameter's shape; its scalars as they are.
        """
        flat, offset, count = self._place_of(parameter)

        def gathered(value: Tensor) -> Tensor:
            if value.shape != flat.shape:
                return value
            whole: Tensor = self.engine._fp32_state_allgather(parameter, value.detach().narrow(0, offset, count))
            return whole

        state = self.engine.optimizer.state.get(flat, {})
        return {key: gathered(value) for key, value in {"master": flat, **state}.items() if isinstance(value, Tensor)}

    def take_state(self, parameter: nn.Parameter, whole: dict[str, Tensor]) -> None:
        """Keep this process's part of what :meth:`gathered_state` gave, there or among other processes."""
        flat, offset, count = self._place_of(parameter)
        state = self.engine.optimizer.state[flat]
        for key, value in whole.items():
            if key != "master" and tuple(value.shape) != shape_of(parameter):
                state[key] = value.clone()
                continue
            if key != "master" and key not in state:
                state[key] = torch.zeros_like(flat, requires_grad=False)
            target = flat.data if key == "master" else state[key]
            rank = self.engine._get_param_partition_rank(parameter)
            part = value.flatten()[rank * count : (rank + 1) * count]
            target.narrow(0, offset, len(part)).copy_(part)  # the last process's part is padded

    def _place_of(self, parameter: nn.Parameter) -> tuple[Tensor, int, int]:
        """The flat fp32 tensor that holds this process's part of ``parameter``, and where in it."""
        group, offset, count = self.engine.grad_position[self.engine.get_param_id(parameter)]
        return self.engine.fp32_partitioned_groups_flat[group], offset, count

    def leave_block(self) -> None:
        """Let go of the hooks, copies and buffers of the parameters that were trained."""
        engine = self.engine
        for hook in (*engine._grad_acc_hooks, *engine._leaf_module_hooks):
            hook.remove()
        for name in (
            "_grad_acc_hooks",
            "_leaf_module_hooks",
            "fp16_groups",
            "fp16_partitioned_groups",
            "fp16_partitioned_groups_flat",
            "fp16_partitioned_groups_flat_numel",
            "fp16_partitioned_groups_flat_id",
            "fp32_partitioned_groups_flat",
            "param_groups_fp16_flat_cpu_memory",
            "next_swappable_fp32_partitioned_groups",
            "groups_padding",
            "sub_group_process_groups",
            "sub_group_partition_counts",
        ):
            setattr(engine, name, [])
        for name in ("sub_group_to_group_id", "averaged_gradients", "grad_position", "params_already_reduced"):
            setattr(engine, name, {})
        engine.param_dict = {}
        engine.grad_partitions_flat_buffer = None
        for bucket in engine.ipg_buckets.values():
            bucket.clear_params()

    def enter_block(self) -> None:
        """Set DeepSpeed up for the parameters that are trainable now, as its constructor does."""
        engine = self.engine
        for group, parameters in zip(engine.optimizer.param_groups, self._optimizer.user_groups(), strict=True):
            group["params"] = parameters
        engine.trainable_param_groups = engine._get_trainable_parameter_groups()
        engine._create_fp16_partitions_with_defragmentation(engine.trainable_param_groups)
        for parameter in itertools.chain.from_iterable(engine.fp16_groups):
            identifier = engine.get_param_id(parameter)
            engine.param_dict[identifier] = parameter
            engine.params_already_reduced[identifier] = False
        engine._setup_for_real_optimizer()
        engine.set_grad_positions()
        engine.create_reduce_and_remove_grad_hooks()
        engine.debug_fp16_grads = [{} for _ in engine.fp16_groups]
        engine._link_all_hp_params()
        coordinator = engine.parameter_offload.get_param_coordinator()
        _forget_releases(coordinator)
        if not coordinator.is_invalid_trace():  # as it is before the first forward, of a run that is resumed
            coordinator._invalidate_trace()


def _forget_releases(coordinator: Any) -> None:
    """DeepSpeed remembers by the place in a micro-batch what it let go of there; the next block has another order."""
    remembered = type(coordinator)._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(remembered).nonlocals["func"].cache_clear()  # the lru_cache behind a profiler's range


def check_installed() -> None:
    """Refuse to go on without a DeepSpeed whose private methods were tried.

    Raises:
        InputError: if there is none, or of another version, with those that were.
    """
    if find_spec("deepspeed") is None:
        raise InputError(
            "The engine zero3 needs deepspeed, which cannot be imported here.",
            advice="Install it with: DS_BUILD_OPS=0 pip install 'badam[zero3]', or plan with --engine fsdp2.",
        )
    import deepspeed

    if not deepspeed.__version__.startswith(KNOWN_VERSIONS):
        raise InputError(
            f"DeepSpeed {deepspeed.__version__} is not known to work: switching blocks needs private parts of it, "
            f"and those of {', '.join(version + 'x' for version in KNOWN_VERSIONS)} were tried.",
            advice="Install deepspeed==0.19.8, or train on FSDP2.",
        )


def without_shared_memory_operator(device: torch.device) -> None:
    """On the CPU it would be compiled for two minutes, and does what gloo does."""
    if device.type == "cpu" and not torch.cuda.is_available():
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _check(engine: Any) -> None:
    if type(engine).__name__ != "DeepSpeedZeroOptimizer_Stage3":
        raise InputError(
            f"ds_optimizer is a {type(engine).__name__}; blocks are trained on DeepSpeed's ZeRO stage 3.",
            advice='Set "stage": 3 in the configuration of "zero_optimization", and pass engine.optimizer.',
        )
    check_installed()

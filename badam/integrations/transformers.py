"""What the Hugging Face Trainer and TRL's trainers need to know about block-coordinate training."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from badam.checkpointing import enable_for_transformers
from badam.errors import InputError
from badam.optim.base import hides_gradients, innermost_optimizer
from badam.tensors.dtensor import is_sharded

DEEPSPEED_FIRST_SCALE = 2.0**16
"""Where DeepSpeed's dynamic loss scaling begins if its configuration says nothing."""


class BAdamCallback(TrainerCallback):
    """Sets up a trainer for a block optimizer; pass an instance or the class in ``callbacks``.

    * Activation checkpointing becomes block-aware: no graph and no checkpoints below the active block.
    * ``max_grad_norm`` is applied also where the optimizer keeps gradients to itself, and the logged norm is right.
    * Of whole copies in several processes the optimizer averages gradients in the place of ``DistributedDataParallel``.
    * Of a model that is sharded with FSDP2, by transformers as it was read (``distributed_config``) or otherwise, no
      layer below the active block is gathered in backward.
    * Under DeepSpeed's ZeRO-3 it connects the two, and checkpoints are read into the block they were saved in.
    * At the end of training the last block is rounded into the model like all others.

    Args:
        init_loss_scale: under DeepSpeed's dynamic loss scaling, the first scale as a power of two, in the place of
            DeepSpeed's own 16, which overflows in the first steps; a first scale that the user has set stays.
    """

    def __init__(self, *_: Any, init_loss_scale: int = 12, **__: Any) -> None:
        self.init_loss_scale = init_loss_scale
        self._norm: float | None = None
        self._standing_aside = ExitStack()  # DDP, while the optimizer averages in its place

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Under DeepSpeed, have a checkpoint read into the block that was active when it was saved.

        Raises:
            InputError: if DeepSpeed has a version that is not known.
        """
        if getattr(args, "deepspeed", None):
            from badam.optim.driver import follow_checkpoints

            follow_checkpoints()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make checkpointing block-aware and check that the arguments suit the optimizer.

        Raises:
            InputError: if the optimizer releases gradients at once and the arguments ask to clip or accumulate them, or
                if accelerate has put DeepSpeed's optimizer for the host in the place of the block optimizer.
        """
        if kwargs.get("model") is not None:
            enable_for_transformers(kwargs["model"])
        self._connect_deepspeed(kwargs.get("optimizer"))
        optimizer = innermost_optimizer(kwargs.get("optimizer"))
        self._average_gradients(optimizer)
        self._follow_sharding(kwargs.get("model"), optimizer)
        _warn_of_a_new_beginning(state, optimizer)
        if not getattr(optimizer, "gradient_release", False):
            return
        if args.max_grad_norm and args.max_grad_norm > 0:
            raise InputError(
                f"gradient_release steps on each gradient as it appears, so max_grad_norm={args.max_grad_norm} cannot "
                "be applied to all of them together.",
                advice="Set max_grad_norm=0, or leave gradient_release off.",
            )
        if args.gradient_accumulation_steps > 1:
            raise InputError(
                f"gradient_release cannot accumulate gradients over {args.gradient_accumulation_steps} batches.",
                advice="Set gradient_accumulation_steps=1, or leave gradient_release off.",
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clip gradients that the trainer, which looks at ``parameter.grad``, has not seen."""
        optimizer = innermost_optimizer(kwargs.get("optimizer"))
        self._norm = None
        if hides_gradients(optimizer) and not getattr(optimizer, "gradient_release", False):
            limit = args.max_grad_norm if args.max_grad_norm and args.max_grad_norm > 0 else float("inf")
            self._norm = float(optimizer.clip_grad_norm_(limit))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the norm of the gradients that were clipped here in the place of the trainer's, which saw none."""
        if self._norm is None:
            return
        for record in (logs, state.log_history[-1] if state.log_history else None):
            if record is not None and "grad_norm" in record:
                record["grad_norm"] = self._norm

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Round the last block's masters into the model."""
        optimizer = innermost_optimizer(kwargs.get("optimizer"))
        if hasattr(optimizer, "write_back_block"):
            optimizer.write_back_block()
        self._standing_aside.close()

    def _average_gradients(self, optimizer: Any) -> None:
        """Of whole copies in several processes, let the block optimizer average gradients in the place of DDP."""
        if not dist.is_available() or not dist.is_initialized() or not hasattr(optimizer, "average_over_processes"):
            return
        from badam.distributed.ddp import average_instead_of_ddp
        from badam.optim.host_checks import ddp_wrappers_of

        for wrapper in ddp_wrappers_of(optimizer.named_parameters_list[0][1]):
            self._standing_aside = average_instead_of_ddp(wrapper, optimizer)

    def _follow_sharding(self, model: Any, optimizer: Any) -> None:
        """Let the gathers of a model that FSDP2 has sharded follow the active block."""
        if not is_sharded(next(model.parameters(), None) if model is not None else None):
            return
        from badam.distributed.fsdp2 import follow_blocks, thaw_for_first_forward
        from badam.optim.block import BlockOptimizer

        if isinstance(optimizer, BlockOptimizer):
            thaw_for_first_forward(model, optimizer.trained_names)
            self._standing_aside.callback(follow_blocks(model, optimizer))

    def _connect_deepspeed(self, optimizer: Any) -> None:
        """Tell the block optimizer which DeepSpeed optimizer drives it."""
        engine = getattr(optimizer, "optimizer", None)
        inner: Any = getattr(engine, "optimizer", None)
        if type(inner).__module__.startswith("deepspeed.ops"):
            raise InputError(
                f"With the optimizer offloaded, accelerate has replaced the block optimizer by DeepSpeed's "
                f"{type(inner).__name__}, which would train the first block alone.",
                advice='Set "zero_force_ds_cpu_optimizer": false in the configuration of DeepSpeed.',
            )
        if engine is None or not hasattr(inner, "ds_optimizer"):
            return
        inner.ds_optimizer = engine
        scaler: Any = getattr(engine, "loss_scaler", None)
        dynamic = scaler is not None and getattr(engine, "dynamic_loss_scale", False)
        if dynamic and scaler.cur_scale == DEEPSPEED_FIRST_SCALE:
            scaler.cur_scale = 2.0**self.init_loss_scale


def _warn_of_a_new_beginning(state: TrainerState, optimizer: Any) -> None:
    """Say so where a trainer goes on from a checkpoint in which it found no state of the optimizer."""
    if state.global_step and getattr(optimizer, "global_step", None) == 0:
        warnings.warn(
            f"The trainer goes on after step {state.global_step}, but no state of the optimizer was loaded: the visits "
            "to the blocks begin anew, without masters and moments. Resume with what wrote the checkpoint (one process "
            "or DeepSpeed), and write it with save_only_model=False.",
            stacklevel=2,
        )

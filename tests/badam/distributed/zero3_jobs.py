"""What the processes of the tests of DeepSpeed ZeRO-3 run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from badam import BlockOptimizer
from badam.distributed import load_zero3_checkpoint, save_zero3_checkpoint
from badam.errors import InputError
from tests.badam.distributed.small_training import (
    ACCUMULATE,
    GLOBAL_BATCH,
    LAYERS,
    OPTIONS,
    SAVED_AT,
    SWITCH_EVERY,
    THREE_EPOCHS,
    VOCABULARY,
    Run,
    adamw,
    make_net,
    micro_batch,
)


def deepspeed_engine(
    dtype: str = "float32",
    accumulate: int = ACCUMULATE,
    attach: bool = True,
    clip: float = 0.0,
    offload: tuple[str, ...] = (),
    **options: Any,
) -> tuple[Any, BlockOptimizer]:
    """The net under DeepSpeed ZeRO-3, without compiling its shared-memory operator."""
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = make_net(dtype)
    optimizer = BlockOptimizer(adamw(model.parameters()), list(model.named_parameters()), **{**OPTIONS, **options})
    config = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // dist.get_world_size(),
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "reduce_bucket_size": 10_000,
            **{f"offload_{what}": {"device": "cpu"} for what in offload},
        },
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if attach:
        optimizer.ds_optimizer = engine.optimizer
    return engine, optimizer


def train_with_deepspeed(engine: Any, optimizer: BlockOptimizer, steps: int) -> list[float]:
    losses = []
    while optimizer.global_step < steps:
        total = torch.zeros(())
        for part in range(ACCUMULATE):
            tokens = micro_batch(optimizer.global_step, part)
            logits = engine(tokens[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
            engine.backward(loss)
            engine.step()
            total += loss.detach() / ACCUMULATE
        dist.all_reduce(total)
        losses.append(float(total / dist.get_world_size()))
    return losses


def gathered(model: nn.Module) -> dict[str, Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def run_deepspeed(**settings: Any) -> Run:
    engine, optimizer = deepspeed_engine(**settings)
    losses = train_with_deepspeed(engine, optimizer, THREE_EPOCHS)
    return losses, gathered(engine.module)


def save_deepspeed(directory: str, dtype: str = "float32") -> Run:
    engine, optimizer = deepspeed_engine(dtype)
    train_with_deepspeed(engine, optimizer, SAVED_AT)
    save_zero3_checkpoint(engine, optimizer, directory, "saved")
    return train_with_deepspeed(engine, optimizer, THREE_EPOCHS), gathered(engine.module)


def resume_deepspeed(directory: str, dtype: str = "float32") -> Run:
    engine, optimizer = deepspeed_engine(dtype)
    train_with_deepspeed(engine, optimizer, 1)  # not where it was saved
    load_zero3_checkpoint(engine, optimizer, f"{directory}/saved")
    assert (optimizer.global_step, optimizer.steps_in_visit) == (SAVED_AT, 2)
    return train_with_deepspeed(engine, optimizer, THREE_EPOCHS), gathered(engine.module)


def save_portable(directory: str, dtype: str = "float32") -> Run:
    engine, optimizer = deepspeed_engine(dtype)
    train_with_deepspeed(engine, optimizer, SAVED_AT)
    save_zero3_checkpoint(engine, optimizer, directory, "portable", portable=True)
    return train_with_deepspeed(engine, optimizer, THREE_EPOCHS), gathered(engine.module)


def resume_portable(directory: str, dtype: str = "float32", fresh: bool = True) -> Run:
    engine, optimizer = deepspeed_engine(dtype)
    if not fresh:
        train_with_deepspeed(engine, optimizer, 1)  # not where it was saved
    load_zero3_checkpoint(engine, optimizer, f"{directory}/portable")
    assert (optimizer.global_step, optimizer.steps_in_visit) == (SAVED_AT, 2)
    return train_with_deepspeed(engine, optimizer, THREE_EPOCHS), gathered(engine.module)


def other_number_of_processes(directory: str) -> str:
    path = Path(directory) / "saved" / "badam.json"
    path.write_text(path.read_text().replace('"processes": 2', '"processes": 4')) if dist.get_rank() == 0 else None
    dist.barrier()
    engine, optimizer = deepspeed_engine()
    try:
        load_zero3_checkpoint(engine, optimizer, f"{directory}/saved")
    except InputError as error:
        return str(error)
    return "nothing"


def last_updates() -> list[tuple[bool, bool]]:
    """For each visit: whether its last step changed the trained block's weights, and any others."""
    engine, optimizer = deepspeed_engine(switch_mode="ascending")
    changed = []
    for visit in range(LAYERS):
        prefix = optimizer.current_block.prefixes[0]
        train_with_deepspeed(engine, optimizer, visit * SWITCH_EVERY + SWITCH_EVERY - 1)
        before = gathered(engine.module)
        train_with_deepspeed(engine, optimizer, (visit + 1) * SWITCH_EVERY)
        after = gathered(engine.module)
        moved = {name for name in before if not before[name].equal(after[name])}
        inside = {name for name in before if name.startswith(f"{prefix}.")}
        changed.append((moved == inside, bool(moved - inside)))
    return changed


def deepspeed_refusals(directory: str) -> dict[str, str]:
    import deepspeed

    messages = {}
    engine, optimizer = deepspeed_engine(attach=False)
    usual = deepspeed.__version__

    def unknown_version() -> None:
        deepspeed.__version__ = "0.20.1"
        optimizer.ds_optimizer = engine.optimizer

    attempts: dict[str, Callable[[], Any]] = {
        "not attached": lambda: train_with_deepspeed(engine, optimizer, 1),
        "unknown version": unknown_version,
        "not stage 3": lambda: setattr(optimizer, "ds_optimizer", optimizer.base_optimizer),
        "missing": lambda: load_zero3_checkpoint(engine, optimizer, f"{directory}/none"),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except InputError as error:
            messages[name] = str(error)
    deepspeed.__version__ = usual
    return messages


def zero3_in_a_trainer(directory: str) -> tuple[int, int, bool, list[float]]:
    """Steps, visits, whether DeepSpeed drives the optimizer, and the losses of a Hugging Face Trainer under ZeRO-3.

    Two patches let transformers and accelerate run bf16 DeepSpeed on the CPU, which they do for cards only.
    """
    import accelerate.state
    import deepspeed.ops
    import transformers.training_args
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    from badam import BAdamCallback

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    prepare = accelerate.state.PartialState._prepare_backend
    accelerate.state.PartialState._prepare_backend = lambda self, cpu=False, *rest: prepare(self, True, *rest)
    config = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 10_000},
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": ACCUMULATE,
        "gradient_clipping": 1.0,
    }
    arguments = TrainingArguments(
        directory,
        deepspeed=config,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATE,
        max_steps=LAYERS * SWITCH_EVERY,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=True,
        disable_tqdm=True,
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, use_cache=False))
    optimizer = BlockOptimizer(adamw(model.parameters()), list(model.named_parameters()), **OPTIONS)

    class BlockTrainer(Trainer):
        def create_optimizer(self, model: Any = None) -> Any:
            self.optimizer = optimizer
            return optimizer

    rows = [[(start + step) % VOCABULARY for step in range(12)] for start in range(64)]
    trainer = BlockTrainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[BAdamCallback],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return optimizer.global_step, optimizer.visit, optimizer.ds_optimizer is not None, losses


def peak_of_building(directory: str, how: str) -> tuple[int, int]:
    """Bytes that this process's resident memory grew by at most while it built a model, and the model's own.

    Args:
        directory: with the model's configuration and weights; written by the first process where there is none.
        how: ``whole``, as random weights are built, ``read`` from ``directory``, or ``resumed``, to be filled later.
    """
    import resource

    import psutil
    from transformers import AutoModelForCausalLM, LlamaConfig

    from badam.distributed.deepspeed.engine import numel_of, partitioned_from_the_start

    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "vocab_size": 16000}
    config = LlamaConfig(**sizes, num_attention_heads=8, use_cache=False)
    partitioned = partitioned_from_the_start(torch.float32, initializes=how == "read", offload_parameters=False)
    deepspeed_engine()  # what importing and starting DeepSpeed takes is no part of the model
    before = psutil.Process().memory_info().rss
    if how == "whole":
        model = AutoModelForCausalLM.from_config(config)
        if dist.get_rank() == 0:
            model.save_pretrained(directory)
    else:
        with partitioned:
            if how == "read":
                model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
            else:
                model = AutoModelForCausalLM.from_config(config)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak - before, 4 * sum(numel_of(parameter) for parameter in model.parameters())

"""Hugging Face's Trainer with a block optimizer in one process and in several, as its users and LLaMA-Factory do it."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from badam import BAdamCallback, BlockOptimizer, clip_grad_norm_old_version
from badam.errors import BadamError
from tests.badam.distributed.small_training import whole
from tests.badam.distributed.step_memory_jobs import SentBytes

LAYERS, EVERY, ACCUMULATE, GLOBAL_BATCH, VOCABULARY = 3, 3, 2, 4, 64
STEPS = 2 * LAYERS * EVERY
STOP = 2 * EVERY + 2
"""Within the third visit, whose block is not the one that a new run begins with."""


class Course(NamedTuple):
    """How a run went."""

    losses: list[float]
    norms: list[float]
    visits: list[dict[str, Tensor]]  # the weights after each visit
    gathers: list[int]  # of FSDP2, in each step


class AfterVisits(TrainerCallback):
    """Keeps the weights as they are when a visit is over, and counts what is gathered in each step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []
        self.gathers: list[int] = []
        self._counter = SentBytes()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._counter = SentBytes()
        self._counter.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._counter.__exit__(None, None, None)
        self.gathers.append(self._counter.counts.get("_allgather_base_", 0))
        if state.global_step % EVERY == 0:
            self.seen.append(weights(kwargs["model"]))


def save_model(directory: Path) -> None:
    """The model that all of them train, in fp32."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, use_cache=False)
    LlamaForCausalLM(config).save_pretrained(directory)


def settings(directory: Path, **changes: Any) -> TrainingArguments:
    count = dist.get_world_size() if dist.is_initialized() else 1
    given = {
        "output_dir": str(directory / "run"),
        "per_device_train_batch_size": GLOBAL_BATCH // (ACCUMULATE * count),
        "gradient_accumulation_steps": ACCUMULATE,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": STOP,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(**{**given, **changes})


def rows() -> list[dict[str, list[int]]]:
    tokens = [[(3 * start + step * step) % VOCABULARY for step in range(12)] for start in range(STEPS * GLOBAL_BATCH)]
    return [{"input_ids": row, "labels": row} for row in tokens]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights, of which ZeRO-3 gives each process a part."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def block_optimizer(model: nn.Module, rate: float, **options: Any) -> BlockOptimizer:
    """As LLaMA-Factory builds it; its group without decay, the first one, has no parameters in Llama."""
    groups = [{"params": [], "weight_decay": 0.0}, {"params": list(model.parameters()), "weight_decay": 0.1}]
    return BlockOptimizer(
        base_optimizer=torch.optim.AdamW(groups, lr=rate),
        named_parameters_list=list(model.named_parameters()),
        block_prefix_list=None,
        switch_block_every=EVERY,
        start_block=None,
        switch_mode="ascending",
        verbose=0,
        **options,
    )


class LateTrainer(Trainer):
    """Makes its optimizer when training begins: under DeepSpeed none may be given."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer = block_optimizer(self.model, self.args.learning_rate)
        return self.optimizer


class FactoryTrainer(Trainer):
    """What LLaMA-Factory's trainer does for BAdam."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options["callbacks"] = [each for each in options["callbacks"] if each is not BAdamCallback]
        super().__init__(*arguments, **options)
        self.accelerator.clip_grad_norm_ = MethodType(clip_grad_norm_old_version, self.accelerator)
        self.add_callback(BAdamCallback)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        enabled = is_deepspeed_zero3_enabled()
        self.optimizer = block_optimizer(self.model, self.args.learning_rate, ds_zero3_enabled=enabled)
        return self.optimizer


def course(directory: Path, trainer: type[Trainer], resume: str | None = None, **changes: Any) -> Course:
    """One run of a host; ``resume`` is the directory of a run whose checkpoint to continue."""
    sharded = {"distributed_config": changes.pop("distributed_config")} if "distributed_config" in changes else {}
    given = settings(directory, **changes)  # first: under DeepSpeed from_pretrained asks whether to partition
    model = LlamaForCausalLM.from_pretrained(directory / "model", dtype=torch.float32, **sharded)
    seen = AfterVisits()
    host = trainer(model=model, args=given, train_dataset=rows(), callbacks=[BAdamCallback, seen])
    host.train(resume_from_checkpoint=None if resume is None else f"{resume}/checkpoint-{STOP}")
    log = [entry for entry in host.state.log_history if "loss" in entry]
    losses, norms = ([float(entry[name]) for entry in log] for name in ("loss", "grad_norm"))
    return Course(losses, norms, seen.seen, seen.gathers)


def courses(directory: str, wishes: dict[str, dict[str, Any]]) -> dict[str, Course | str]:
    """The runs of several hosts, one after another; what it said of one that was refused."""
    if dist.is_initialized():
        let_accelerate_shard_on_the_cpu()
    found: dict[str, Course | str] = {}
    for name, wish in wishes.items():
        if "fsdp" in wish:
            os.environ["ACCELERATE_USE_FSDP"] = "true"  # as its launcher sets
        try:
            found[name] = course(Path(directory), HOSTS[wish.pop("host", "late")], **wish)
        except BadamError as error:
            found[name] = str(error)
        forget_accelerate()
    return found


def let_accelerate_shard_on_the_cpu() -> None:
    """DeepSpeed and FSDP2, which accelerate enters for cards only; and nothing is compiled for gloo."""
    if find_spec("deepspeed"):
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    prepare = PartialState._prepare_backend

    def on_gloo(self: PartialState, cpu: bool = False, *rest: Any) -> tuple[str, DistributedType]:
        if os.environ.get("ACCELERATE_USE_FSDP"):
            return "gloo", DistributedType.MULTI_GPU
        return prepare(self, True, *rest)

    PartialState._prepare_backend = on_gloo
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def forget_accelerate() -> None:
    """What accelerate and DeepSpeed keep of a run beyond its end."""
    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()
    for name in [each for each in os.environ if each.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


class GivenTrainer(Trainer):
    """Is given its optimizer, as in most people's scripts."""

    def __init__(self, *arguments: Any, model: Any, args: TrainingArguments, **options: Any) -> None:
        optimizer = block_optimizer(model, args.learning_rate)
        super().__init__(*arguments, model=model, args=args, optimizers=(optimizer, None), **options)


class UnawareTrainer(LateTrainer):
    """Was not given the callback."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options["callbacks"] = [each for each in options["callbacks"] if each is not BAdamCallback]
        super().__init__(*arguments, **options)


HOSTS: dict[str, type[Trainer]] = {
    "late": LateTrainer,
    "given": GivenTrainer,
    "factory": FactoryTrainer,
    "unaware": UnawareTrainer,
}
ZERO3: dict[str, Any] = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 10_000},
    "zero_allow_untested_optimizer": True,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
FSDP2: dict[str, Any] = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}

"""What the processes of the distributed tests run; also run by one process, as the reference.

A network small enough to start quickly: an embedding, layers with a norm and two matrices, a head. The global batch is
the same whatever the number of processes; each takes its part of every micro-batch.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from badam import BlockOptimizer, BlockOptimizerRatio, _ranks
from badam.checkpointing import checkpoint_layers
from badam.distributed import (
    average_instead_of_ddp,
    load_checkpoint,
    load_zero3_checkpoint,
    save_checkpoint,
    save_whole_model,
    save_zero3_checkpoint,
    shard_blocks,
    sharded_block_optimizer,
)
from badam.errors import InputError, RanksDisagree, StateError

WIDTH, LAYERS, VOCABULARY = 18, 3, 24  # 18 rows do not divide among 4 processes
GLOBAL_BATCH, LENGTH = 8, 5
SWITCH_EVERY, ACCUMULATE = 3, 2
THREE_EPOCHS = 3 * LAYERS * SWITCH_EVERY


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(torch.nn.functional.gelu(self.up(self.norm(hidden))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


def make_net(dtype: str = "float32") -> Net:
    torch.manual_seed(0)
    return Net().to(getattr(torch, dtype))


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


OPTIONS: dict[str, Any] = {"switch_block_every": SWITCH_EVERY, "switch_mode": "random", "verbose": 0, "seed": 5}


def make(
    how: str, dtype: str = "float32", checkpointed: bool = False, compute: str | None = None, **options: Any
) -> tuple[Net, BlockOptimizer]:
    """The model and its optimizer: ``single``, ``copies``, ``fsdp`` or ``hsdp``."""
    model = make_net(dtype)
    options = {**OPTIONS, **options}
    if checkpointed:
        checkpoint_layers(model, [f"layers.{index}" for index in range(LAYERS)])
    if how in ("fsdp", "hsdp"):
        mesh = None
        if how == "hsdp":
            mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
        shard_blocks(model, mesh=mesh, compute_dtype=getattr(torch, compute) if compute else None)
        return model, sharded_block_optimizer(model, adamw, **options)
    named = list(model.named_parameters())
    return model, BlockOptimizer(adamw(model.parameters()), named, average_gradients=how == "copies", **options)


def micro_batch(step: int, part: int) -> Tensor:
    """This process's share, shape [GLOBAL_BATCH / processes, LENGTH]."""
    generator = torch.Generator().manual_seed(1000 * step + part)
    tokens = torch.randint(0, VOCABULARY, (GLOBAL_BATCH, 1), generator=generator) + torch.arange(LENGTH)
    rank, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return (tokens % VOCABULARY).chunk(count)[rank]


def train(model: nn.Module, optimizer: BlockOptimizer, steps: int, clip: float | None = None) -> list[float]:
    """Optimizer steps up to number ``steps``; the loss of each, over the global batch."""
    losses = []
    while optimizer.global_step < steps:
        total = torch.zeros(())
        for part in range(ACCUMULATE):
            tokens = micro_batch(optimizer.global_step, part)
            logits = model(tokens[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()) / ACCUMULATE
            loss.backward()
            total += loss.detach()
        if dist.is_initialized():
            dist.all_reduce(total, op=dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM)
            total /= dist.get_world_size()
        if clip is not None:
            optimizer.clip_grad_norm_(clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
    return losses


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def run(steps: int = THREE_EPOCHS, clip: float | None = None, **settings: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and final weights."""
    model, optimizer = make(**settings)
    losses = train(model, optimizer, steps, clip)
    return losses, weights(model)


def several(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """:func:`run` for each of ``cases``: starting processes takes longer than training."""
    return {name: run(**settings) for name, settings in cases.items()}


def behind_ddp() -> tuple[list[float], dict[str, Tensor]]:
    model = make_net()
    optimizer = BlockOptimizer(adamw(model.parameters()), list(model.named_parameters()), **OPTIONS)
    wrapped = nn.parallel.DistributedDataParallel(model)
    average_instead_of_ddp(wrapped, optimizer)
    return train(wrapped, optimizer, THREE_EPOCHS), weights(model)


def collectives(visits: int = 2 * LAYERS, **settings: Any) -> list[tuple[str, dict[str, int]]]:
    """For each visit, its block and how often FSDP2 gathered and reduced in one forward and backward."""
    model, optimizer = make(how="fsdp", **settings)
    counted = []
    for _ in range(visits):
        tokens = micro_batch(optimizer.global_step, 0)
        with CommDebugMode() as counter:
            model(tokens).square().mean().backward()
        counts = {str(key).rsplit(".", 1)[-1]: value for key, value in counter.get_comm_counts().items()}
        assert all(parameter.grad is None for parameter in model.parameters())  # the optimizer has taken them
        assert all(each.gradient is not None for each in optimizer.active_parameters)
        counted.append((optimizer.current_block.name, counts))
        optimizer.switch_trainable_params()
    return counted


def states() -> dict[str, Any]:
    """What a process holds of a bf16 model in its second visit: types and entries."""
    model, optimizer = make(how="fsdp", dtype="bfloat16")
    train(model, optimizer, SWITCH_EVERY + 1)
    active = {each.name for each in optimizer.active_parameters}
    local = {name: parameter.to_local() for name, parameter in model.named_parameters()}
    entries = sum(local[name].numel() for name in active)
    state = [
        value.to_local() for entry in optimizer.state.values() for value in entry.values() if isinstance(value, DTensor)
    ]
    return {
        "types": {str(value.dtype) for value in local.values()},
        "entries": entries,
        "masters": [(str(each.dtype), each.to_local().numel()) for each in optimizer.masters.values()],
        "moments": [(str(each.dtype), each.numel()) for each in state],
        "trained": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "active": sorted(active),
    }


def disagree(what: str) -> str:
    """The message that this process gets when rank 1 has another ``what``."""
    odd = dist.get_rank() == 1
    changes: dict[str, Any] = {
        "seed": {"seed": 6},
        "K": {"switch_block_every": 4},
        "partition": {"block_prefix_list": [["layers.0"], ["layers.1"]]},
        "order": {"switch_mode": "ascending"},
    }.get(what, {})
    try:
        model, optimizer = make(how="fsdp", **(changes if odd else {}))
        if what == "learning rate" and odd:
            optimizer.param_groups[0]["lr"] = 1.0
        if what == "learning rate":
            optimizer.load_state_dict(optimizer.state_dict())
        if what == "steps" and odd:
            optimizer.global_step += 1
        model(micro_batch(0, 0)).square().mean().backward()
        optimizer.step()
    except RanksDisagree as error:
        return str(error)
    return "nothing"


def one_switches_alone() -> str:
    """Rank 1 leaves its block early; it says so when the others do not come."""
    usual, _ranks.PATIENCE = _ranks.PATIENCE, timedelta(seconds=1)
    _, optimizer = make(how="copies")
    _ranks.PATIENCE = usual
    if dist.get_rank() == 0:
        time.sleep(2)
        return "waited"
    try:
        optimizer.switch_trainable_params()
    except RanksDisagree as error:
        return str(error)
    return "nothing"


def non_finite_on_one_rank(how: str) -> tuple[int, int, bool]:
    """Steps skipped and done, and whether any weight is wrong, when rank 1 alone has an infinite gradient."""
    model, optimizer = make(how=how)
    train(model, optimizer, 1)
    model(micro_batch(9, 0)).square().mean().backward()
    if dist.get_rank() == 1:
        gradient = optimizer.active_parameters[1].gradient
        assert gradient is not None
        (gradient.to_local() if isinstance(gradient, DTensor) else gradient).view(-1)[0] = float("inf")
    optimizer.step()
    return optimizer.non_finite_steps, optimizer.global_step, all(w.isfinite().all() for w in weights(model).values())


def every_disagreement() -> dict[str, str]:
    """:func:`disagree` for all that processes can disagree on."""
    return {what: disagree(what) for what in ("seed", "K", "partition", "order", "learning rate", "steps")}


def rounded(how: str) -> dict[str, Tensor]:
    """What this process holds of a bf16 model that was rounded stochastically at several switches."""
    model, _ = trained = make(how=how, dtype="bfloat16")
    train(*trained, THREE_EPOCHS)
    return {
        name: (p.to_local() if isinstance(p, DTensor) else p).detach().float() for name, p in model.named_parameters()
    }


def with_unused_parameters() -> dict[str, Tensor]:
    """Weights where only rank 0 uses the second matrix of the layers, like an expert that a router leaves out."""
    model, optimizer = make(how="copies", switch_mode="fixed", start_block=1)
    layer = model.layers[1]
    if dist.get_rank() == 1:
        layer.forward = lambda hidden: hidden + layer.norm(hidden)
    train(model, optimizer, 2)
    return weights(model)


def refused(what: str) -> str:
    """The message for options that sharded parameters cannot have."""
    try:
        if what == "one process":
            dist.destroy_process_group()
            shard_blocks(make_net())
        elif what == "plain model":
            sharded_block_optimizer(make_net(), adamw)
        elif what == "ratio":
            model = shard_blocks(make_net())
            BlockOptimizerRatio(list(model.parameters()), list(model.named_parameters()))
        else:
            options: dict[str, Any] = {
                "rows": {"max_block_parameters": 100},
                "release": {"gradient_release": True},
                "average": {"average_gradients": True},
            }[what]
            make(how="fsdp", **options)
    except InputError as error:
        return str(error)
    return "nothing"


def every_refusal() -> dict[str, str]:
    return {what: refused(what) for what in ("plain model", "ratio", "rows", "release", "average")}


def all_of(requests: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Several functions of this module one after another, because starting processes takes longer than they do.

    What one of them raises takes the place of its result.
    """
    results: dict[str, Any] = {}
    for name, (function, settings) in requests.items():
        try:
            results[name] = globals()[function](**settings)
        except Exception:
            results[name] = AssertionError(traceback.format_exc())
    return results


SAVED_AT = SWITCH_EVERY + 2  # in the middle of the second visit


def save(path: str, how: str = "fsdp", dtype: str = "float32") -> tuple[list[float], dict[str, Tensor]]:
    """Train, save in the middle of a visit, train on: the losses and weights that a resumed run must have."""
    model, optimizer = make(how, dtype)
    train(model, optimizer, SAVED_AT)
    save_checkpoint(path, model, optimizer)
    losses = train(model, optimizer, THREE_EPOCHS)
    return losses, weights(model)


def resume(path: str, how: str = "fsdp", dtype: str = "float32") -> tuple[list[float], dict[str, Tensor]]:
    model, optimizer = make(how, dtype)
    train(model, optimizer, 1)  # not where it was saved
    load_checkpoint(path, model, optimizer)
    assert (optimizer.global_step, optimizer.steps_in_visit) == (SAVED_AT, 2)
    return train(model, optimizer, THREE_EPOCHS), weights(model)


def checkpoint_refusals(path: str) -> dict[str, str]:
    """Messages for a checkpoint that is there, is not, is not whole, or is of another partition."""
    model, optimizer = make("fsdp")
    other = make("fsdp", block_prefix_list=[["layers.0"], ["layers.1", "layers.2"]])
    partial = Path(path).with_name("partial")
    partial.mkdir(exist_ok=True)
    attempts: dict[str, Callable[[], Any]] = {
        "there": lambda: save_checkpoint(path, model, optimizer),
        "missing": lambda: load_checkpoint(path + "-none", model, optimizer),
        "partial": lambda: load_checkpoint(partial, model, optimizer),
        "partition": lambda: load_checkpoint(path, *other),
        "not transformers": lambda: save_whole_model(path + "-model", model),
    }
    messages = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except (InputError, StateError) as error:
            messages[name] = str(error)
    return messages


def whole_model(path: str) -> dict[str, Tensor]:
    """A sharded Llama written for from_pretrained; returns its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).to(torch.bfloat16)
    shard_blocks(model)
    save_whole_model(path, model)
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def steps_in(path: str) -> int:
    """The step at which a checkpoint was taken, once it is loaded."""
    model, optimizer = make("fsdp")
    load_checkpoint(path, model, optimizer)
    return optimizer.global_step


def llama_peak(plan_json: str, block: int) -> dict[str, Any]:
    """Highest allocated bytes of one visit to a block, by the allocator's own reports, and the collectives of a step.

    Everything is made while the allocator is listened to, so that the account is a plain sum.
    """
    import gc

    from badam.plan import Plan
    from badam.profiling.allocator_log import AllocatorLog
    from badam.training.assemble import build_model, prepare_checkpointing
    from badam.training.step import forward_loss

    plan = Plan.model_validate_json(plan_json)
    staged = plan.partition.blocks[block]
    gc.collect()
    log = AllocatorLog()
    log.start()
    torch.manual_seed(0)
    model = build_model(plan.model, plan.training)
    shard_blocks(model)
    optimizer = sharded_block_optimizer(
        model,
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-5, fused=True),
        block_prefix_list=[list(staged.prefixes)],
        switch_mode="fixed",
        switch_block_every=0,
        verbose=0,
    )
    prepare_checkpointing(
        model, optimizer, plan.model_copy(update={"partition": plan.partition.model_copy(update={"blocks": (staged,)})})
    )
    shape = (plan.training.batch_size, plan.training.seq_len)

    def step() -> None:
        for _ in range(plan.training.grad_accum):
            tokens = torch.zeros(shape, dtype=torch.int64)
            batch = {"input_ids": tokens, "labels": torch.zeros(shape, dtype=torch.int64)}
            forward_loss(model, batch, plan.training.loss, num_items=torch.tensor(8)).backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()

    return measured_step(step, log)


def zero3_peak(plan_json: str, block: int) -> dict[str, Any]:
    """The same as :func:`llama_peak` under DeepSpeed."""
    import gc

    from badam.distributed.zero3_engine import backward, start_zero3
    from badam.plan import Plan
    from badam.profiling.allocator_log import AllocatorLog
    from badam.training.assemble import build_model, prepare_checkpointing
    from badam.training.step import forward_loss

    plan = Plan.model_validate_json(plan_json)
    staged = plan.partition.blocks[block]
    alone = plan.model_copy(update={"partition": plan.partition.model_copy(update={"blocks": (staged,)})})
    gc.collect()
    log = AllocatorLog()
    log.start()
    torch.manual_seed(0)
    model = build_model(plan.model, plan.training)
    optimizer = BlockOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True),
        list(model.named_parameters()),
        block_prefix_list=[list(staged.prefixes)],
        switch_mode="fixed",
        switch_block_every=0,
        verbose=0,
    )
    prepare_checkpointing(model, optimizer, alone)
    accumulate = plan.training.grad_accum
    engine = start_zero3(
        model, optimizer, batch_size=plan.training.batch_size, accumulate=accumulate, max_grad_norm=1.0
    )
    shape = (plan.training.batch_size, plan.training.seq_len)

    def step() -> None:
        for part in range(accumulate):
            tokens = torch.zeros(shape, dtype=torch.int64)
            batch = {"input_ids": tokens, "labels": torch.zeros(shape, dtype=torch.int64)}
            loss = forward_loss(model, batch, plan.training.loss, num_items=torch.tensor(8))
            backward(engine, loss, is_last=part + 1 == accumulate)
        engine.step()

    step()  # DeepSpeed learns the order of the layers in the first step, and gathers ahead from the second on
    return measured_step(step, log)


def measured_step(step: Callable[[], None], log: Any) -> dict[str, Any]:
    """The highest allocated bytes in the second of three calls of ``step``, and the collectives of the third."""
    import gc

    step()
    gc.collect()
    log.mark(0)
    step()
    events = log.stop()
    live = peak = 0
    counting = False
    there: dict[int, int] = {}  # by address: a block that another thread took back is known by its next use alone
    for address, nbytes in events:
        counting = counting or nbytes == 0
        if nbytes:
            live += max(nbytes, 0) - there.pop(address, 0)
        if nbytes > 0:
            there[address] = nbytes
        peak = max(peak, live) if counting else 0
    with SentBytes() as counter:
        step()
    return {"peak": peak, "counts": counter.counts, "sent": counter.sent}


def llama_sent_by_full_training(plan_json: str) -> float:
    """Bytes that this process sends in a step that trains every parameter."""
    from badam.plan import Plan
    from badam.training.assemble import build_model
    from badam.training.step import forward_loss

    plan = Plan.model_validate_json(plan_json)
    model = build_model(plan.model, plan.training)
    shard_blocks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    shape = (plan.training.batch_size, plan.training.seq_len)
    for _ in range(2):
        with SentBytes() as counter:
            batch = {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "labels")}
            forward_loss(model, batch, plan.training.loss, num_items=torch.tensor(8)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return counter.sent


class SentBytes(TorchDispatchMode):
    """Counts collectives and the bytes that each process sends for them by the ring algorithm."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = str(func._overloadpacket).rpartition(".")[2]
            first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
            second = args[1][0] if isinstance(args[1], (list, tuple)) else args[1]
            whole = {
                "_allgather_base_": lambda: first,
                "_reduce_scatter_base_": lambda: second,
                "allreduce_": lambda: first,
            }.get(name)
            if whole is not None:
                tensor, share = whole(), (dist.get_world_size() - 1) / dist.get_world_size()
                self.counts[name] = self.counts.get(name, 0) + 1
                self.sent += tensor.nbytes * share * (2 if name == "allreduce_" else 1)
        return func(*args, **(kwargs or {}))


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


def run_deepspeed(**settings: Any) -> tuple[list[float], dict[str, Tensor]]:
    engine, optimizer = deepspeed_engine(**settings)
    losses = train_with_deepspeed(engine, optimizer, THREE_EPOCHS)
    return losses, gathered(engine.module)


def save_deepspeed(directory: str, dtype: str = "float32") -> tuple[list[float], dict[str, Tensor]]:
    engine, optimizer = deepspeed_engine(dtype)
    train_with_deepspeed(engine, optimizer, SAVED_AT)
    save_zero3_checkpoint(engine, optimizer, directory, "saved")
    return train_with_deepspeed(engine, optimizer, THREE_EPOCHS), gathered(engine.module)


def resume_deepspeed(directory: str, dtype: str = "float32") -> tuple[list[float], dict[str, Tensor]]:
    engine, optimizer = deepspeed_engine(dtype)
    train_with_deepspeed(engine, optimizer, 1)  # not where it was saved
    load_zero3_checkpoint(engine, optimizer, f"{directory}/saved")
    assert (optimizer.global_step, optimizer.steps_in_visit) == (SAVED_AT, 2)
    return train_with_deepspeed(engine, optimizer, THREE_EPOCHS), gathered(engine.module)


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


def save_portable(directory: str, dtype: str = "float32") -> tuple[list[float], dict[str, Tensor]]:
    engine, optimizer = deepspeed_engine(dtype)
    train_with_deepspeed(engine, optimizer, SAVED_AT)
    save_zero3_checkpoint(engine, optimizer, directory, "portable", portable=True)
    return train_with_deepspeed(engine, optimizer, THREE_EPOCHS), gathered(engine.module)


def resume_portable(
    directory: str, dtype: str = "float32", fresh: bool = True
) -> tuple[list[float], dict[str, Tensor]]:
    engine, optimizer = deepspeed_engine(dtype)
    if not fresh:
        train_with_deepspeed(engine, optimizer, 1)  # not where it was saved
    load_zero3_checkpoint(engine, optimizer, f"{directory}/portable")
    assert (optimizer.global_step, optimizer.steps_in_visit) == (SAVED_AT, 2)
    return train_with_deepspeed(engine, optimizer, THREE_EPOCHS), gathered(engine.module)

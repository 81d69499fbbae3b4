"""A small network and its training, on any number of processes or on one, as the reference.

A network small enough to start quickly: an embedding, layers with a norm and two matrices, a head. The global batch is
the same whatever the number of processes; each takes its share of every micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from badam import BlockOptimizer
from badam.checkpointing import checkpoint_layers
from badam.distributed import shard_blocks, sharded_block_optimizer

WIDTH, LAYERS, VOCABULARY = 18, 3, 24  # 18 rows do not divide among 4 processes
GLOBAL_BATCH, LENGTH = 8, 5
SWITCH_EVERY, ACCUMULATE = 3, 2
THREE_EPOCHS = 3 * LAYERS * SWITCH_EVERY
SAVED_AT = SWITCH_EVERY + 2  # in the middle of the second visit

Run = tuple[list[float], dict[str, Tensor]]


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


def train(
    model: nn.Module, optimizer: BlockOptimizer, steps: int, clip: float | None = None, once: bool = False
) -> list[float]:
    """Optimizer steps up to number ``steps``; the loss of each, over the global batch.

    With ``once`` the copies of a model that is sharded average their gradients in the last micro-batch alone.
    """
    losses = []
    while optimizer.global_step < steps:
        total = torch.zeros(())
        for part in range(ACCUMULATE):
            if once and isinstance(model, FSDPModule):
                model.set_requires_all_reduce(part + 1 == ACCUMULATE)
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


def run(steps: int = THREE_EPOCHS, clip: float | None = None, once: bool = False, **settings: Any) -> Run:
    """Losses and final weights."""
    model, optimizer = make(**settings)
    losses = train(model, optimizer, steps, clip, once)
    return losses, weights(model)


def assert_equal_runs(run: Run, reference: Run) -> None:
    """Losses to 1e-5 relative, weights to 1e-5 absolute."""
    torch.testing.assert_close(run[0], reference[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(run[1], reference[1], rtol=0, atol=1e-5)

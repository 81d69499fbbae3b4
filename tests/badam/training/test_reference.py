"""Block coordinate descent against its definition in ten lines of torch: a new AdamW over one block for each visit."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from badam.plan import BlockPlan, Partition
from badam.training.build import build_optimizer
from badam.training.losses import full_loss
from badam.training.methods import method_of
from badam.training.step import train_step
from tests.badam.training.tiny import LAYERS, tiny_plan

RATE, STEPS = 1e-2, 12


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    tokens = [torch.randint(3, 320, (2, 16), generator=generator) for _ in range(STEPS)]
    return [{"input_ids": one, "labels": one} for one in tokens]


def by_definition(model: nn.Module, blocks: list[tuple[str, ...]], visit: int) -> None:
    turns = cycle(blocks)
    for step, batch in enumerate(batches()):
        if step % visit == 0:
            block = next(turns)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith(block))
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            groups = [
                {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": 0.01},
                {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
            ]
            optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=1e-8, fused=True)
        full_loss(model, batch, None).backward()  # type: ignore[arg-type]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("blocks", "visit"),
    [
        ([("model", "lm_head")], STEPS + 1),
        ([(f"model.layers.{layer}.",) for layer in range(LAYERS)], 2),
        ([("model.embed_tokens", "model.layers.0."), ("model.layers.1.", "lm_head")], 4),
    ],
    ids=["one block of everything is AdamW", "layers", "two blocks"],
)
def test_every_visit_is_a_new_adamw_over_its_block(tiny_llama: Any, blocks: list[tuple[str, ...]], visit: int) -> None:
    torch.set_num_threads(1)
    partition = Partition(
        strategy="layer",
        blocks=tuple(
            BlockPlan(name=str(index), prefixes=tuple(prefix.rstrip(".") for prefix in prefixes), parameters=1)
            for index, prefixes in enumerate(blocks)
        ),
    )
    settings = {"learning_rate": RATE, "weight_decay": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}
    plan = tiny_plan(partition=partition, optimizer=settings, schedule={"switch_every": visit})
    model, twin = (tiny_llama(dtype=torch.float32, vocab_size=320) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    optimizer, method = build_optimizer(model, plan), method_of(plan.method)
    for batch in batches():
        labels = (batch["labels"][:, 1:] != -100).sum()
        train_step(plan, method, model, optimizer, lambda step=(batch, labels): step, micro_batches=1)
    by_definition(twin, blocks, visit)
    reference = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter, reference[name], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )

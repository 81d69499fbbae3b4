"""Layers sampled at random, with embedding and output projection always trained (LISA, arXiv 2403.17919)."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import nn
from torch.optim import Optimizer

from badam.optim.block import BlockOptimizer
from badam.plan import Plan
from badam.training.methods.blocks import BlockCoordinate, block_optimizer
from badam.vocabulary import Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LisaOptimizer(BlockOptimizer):
    """Trains ``sampled_layers`` blocks at a time, drawn anew and uniformly for every visit, and ``active_modules``.

    Which ones is a function of seed and visit. Masters and moments begin anew with every visit, those of
    ``active_modules`` too. A ``start_block`` is trained in the first visit together with the blocks before it.
    """

    def __init__(self, *args: Any, sampled_layers: int, **options: Any) -> None:
        self.sampled_layers = sampled_layers
        super().__init__(*args, **options)

    @property
    def sampled_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks that this visit trains."""
        count = min(self.sampled_layers, self.block_num)
        start = self.schedule.start_block
        if self.visit == 0 and start is not None:
            return _downwards(start, count, self.block_num)
        drawn = random.Random(f"{self.schedule.seed}:{self.visit}")
        return tuple(drawn.sample(range(self.block_num), count))

    @property
    def current_block_idx(self) -> int:
        """The first of the sampled blocks, for those who want one name."""
        return self.sampled_blocks[0]

    @property
    def active_param_prefixs(self) -> list[str]:
        """The prefixes of the sampled blocks and of what is always active."""
        sampled = [str(prefix) for index in self.sampled_blocks for prefix in self.blocks[index].prefixes]
        return [*sampled, *self.active_modules]


class Lisa(BlockCoordinate):
    """The plan's blocks are the layers to sample from."""

    name: ClassVar[Method] = "lisa"
    trains_one_block = False
    trains_ends = True

    def build_optimizer(self, model: nn.Module, plan: Plan, *, start_block: int | None = None) -> Optimizer:
        """AdamW on the sampled layers, embedding and head."""
        return block_optimizer(
            LisaOptimizer,
            model,
            plan,
            start_block,
            active_modules=[*ends_of(cast("PreTrainedModel", model)), *plan.partition.active_modules],
            sampled_layers=plan.training.options.sampled_layers,
        )

    def rehearsed_plan(self, plan: Plan, block: int) -> tuple[Plan, int]:
        """All blocks stay: several are active at a time."""
        return plan, block

    def active_blocks(self, plan: Plan, block: int) -> tuple[int, ...]:
        """As many as are sampled."""
        blocks = len(plan.partition.blocks)
        return _downwards(block, min(plan.training.options.sampled_layers, blocks), blocks)

    def state_bytes(self, parameters: int, largest_block: int, blocks: int, *, quantized: int = 0) -> int:
        """Weights in 16 bits, and 16 bytes per entry that is trained at a time."""
        return 2 * parameters + 16 * largest_block


def _downwards(start: int, count: int, blocks: int) -> tuple[int, ...]:
    """``count`` indices of ``blocks`` from ``start`` on downwards, and after the lowest from the highest on."""
    return tuple((start - position) % blocks for position in range(count))


def ends_of(model: PreTrainedModel) -> list[str]:
    """The paths of embedding and output projection; one if they share their matrix."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    shared = {id(parameter) for end in ends if end is not None for parameter in end.parameters()}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in shared]
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))

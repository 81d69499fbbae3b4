"""AdamW on gradients projected to a low rank (GaLore, arXiv 2403.03507), by galore-torch."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from badam.blocks.names import belongs
from badam.blocks.partition import layer_paths
from badam.errors import InputError
from badam.plan import Plan
from badam.training.methods.base import TrainingMethod, parameter_groups
from badam.vocabulary import Method

DEFAULT_RANK = 128


class GaLore(TrainingMethod):
    """Every parameter has a gradient in the model's type; matrices of layers have moments of rank r only."""

    name: ClassVar[Method] = "galore"
    libraries = {"galore_torch": "galore-torch", "bitsandbytes": "bitsandbytes"}  # noqa: RUF012 - see the base

    def check(self, plan: Plan) -> None:
        """Refuse fp16 as well: its gradients stay in the model's type, where they cannot be scaled back."""
        super().check(plan)
        if plan.training.dtype == "float16":
            raise InputError(
                "galore updates weights of 16 bits without fp32 masters, which in float16 loses what is small.",
                advice="Plan with --dtype bfloat16.",
            )

    def build_optimizer(self, model: nn.Module, plan: Plan, *, start_block: int | None = None) -> Optimizer:
        """galore-torch's AdamW; the matrices inside layers are projected, everything else is trained as by AdamW."""
        from galore_torch.adamw import AdamW
        from galore_torch.galore_projector import GaLoreProjector

        torch.serialization.add_safe_globals([GaLoreProjector])  # checkpoints hold one per projected matrix
        spec, options = plan.training.optimizer, plan.training.options
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        layers = layer_paths(names.values())
        projection = {
            "rank": options.rank or DEFAULT_RANK,
            "update_proj_gap": options.projection_gap,
            "scale": options.projection_scale,
            "proj_type": "std",
        }
        groups: list[dict[str, Any]] = []
        for group in parameter_groups(model, spec.weight_decay):
            inside = [p for p in group["params"] if p.ndim == 2 and belongs(names[id(p)], layers)]
            projected = {id(p) for p in inside}
            groups.append({**group, "params": inside, **projection})
            groups.append({**group, "params": [p for p in group["params"] if id(p) not in projected]})
        optimizer: Optimizer = AdamW(
            [group for group in groups if group["params"]],
            lr=spec.learning_rate,
            betas=spec.betas,
            eps=spec.eps,
            no_deprecation_warning=True,
        )
        return optimizer

    def state_bytes(self, parameters: int, largest_block: int, blocks: int, *, quantized: int = 0) -> int:
        """4M: weights and gradients in 16 bits. Not counted: moments and projections, which depend on shapes."""
        return 4 * parameters

"""The optimizer of a case: its method's, as badam-train builds it, or badam 1.4's."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from badam import phases
from badam.checkpointing import checkpoint_layers
from badam.errors import InputError
from badam.plan import Plan
from badam.training.build import build_optimizer, prepare_checkpointing, prepare_model
from badam.vocabulary import Phase
from benchmarks.gpu.cases import Case

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OLD_PACKAGE = "badam_1_4"
NEVER = 10**9


def case_optimizer(case: Case, plan: Plan, model: PreTrainedModel, old_badam: Path | None) -> torch.optim.Optimizer:
    """The optimizer that a case runs, and the plan's checkpointing, which is the same for all of them.

    Raises:
        InputError: if badam 1.4's is asked for and ``old_badam`` does not hold it.
    """
    if case.side == "own":
        prepare_model(model, plan)
        own = build_optimizer(model, plan)
        prepare_checkpointing(model, own, plan)
        return own
    if old_badam is None:
        raise InputError("badam 1.4 is not here.", advice="Unpack its wheel and name the directory.")
    # Its switches are not told to the checkpoints: a layer in which nothing is trained keeps none.
    checkpoint_layers(model, plan.partition.blocks[0].checkpointed_layers)
    return OldBlockOptimizer(load_old_badam(old_badam), plan, model)


def load_old_badam(directory: Path) -> ModuleType:
    """badam 1.4 from its unpacked wheel, under another name, since it is the same import package as this project.

    Raises:
        InputError: if it is not there or cannot be imported.
    """
    start = directory / "badam" / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        OLD_PACKAGE, start, submodule_search_locations=[str(directory / "badam")]
    )
    if not start.is_file() or not (directory / "badam" / "block_optim.py").is_file() or spec is None:
        raise InputError(f"{directory} does not hold badam 1.4.", advice="Unpack its wheel there.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[OLD_PACKAGE] = module
    try:
        assert spec.loader is not None
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[OLD_PACKAGE]
        raise InputError(f"badam 1.4 in {directory} cannot be imported: {type(error).__name__}: {error}") from error
    return module


class OldMember(NamedTuple):
    """A parameter that badam 1.4 trains, under the names by which the recorder looks for masters."""

    name: str
    parameter: Tensor
    master: Tensor


class OldBlockOptimizer(torch.optim.Optimizer):
    """badam 1.4's optimizer, going through a plan's blocks in order, K steps each.

    Left to itself it switches one step early the first time and does not say so; here it never does, and is told to.
    It prints; that is not shown.

    Args:
        old: the imported package.
        plan: blocks, K, settings of AdamW.
        model: what to train.
    """

    def __init__(self, old: ModuleType, plan: Plan, model: nn.Module) -> None:
        spec = plan.training.optimizer
        names = {name for name, _ in model.named_parameters()}
        # Its prefixes match anywhere in a name: layers.1 would be layers.11 too.
        blocks = [
            [prefix if prefix in names else f"{prefix}." for prefix in block.prefixes]
            for block in plan.partition.blocks
        ]
        base = torch.optim.AdamW(
            model.parameters(),
            lr=spec.learning_rate,
            betas=spec.betas,
            eps=spec.eps,
            weight_decay=spec.weight_decay,
            fused=spec.fused,
        )
        super().__init__(base.param_groups, base.defaults)
        self._blocks, self._every, self._steps = len(blocks), plan.schedule.switch_every, 0
        with contextlib.redirect_stdout(io.StringIO()):
            self._old: Any = old.BlockOptimizer(
                base,
                list(model.named_parameters()),
                block_prefix_list=blocks,
                switch_block_every=NEVER,
                switch_mode="ascending",
                verbose=0,
            )

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The AdamW inside."""
        base: torch.optim.Optimizer = self._old.base_optimizer
        return base

    @property
    def current_block_idx(self) -> int:
        """Index of the active block; its own attribute of this name is the next one's."""
        return self._steps // self._every % self._blocks

    @property
    def param_idx2lp(self) -> dict[int, Tensor]:
        """Active parameters of the model."""
        active: dict[int, Tensor] = self._old.param_idx2lp
        return active

    @property
    def param_idx2hp(self) -> dict[int, Tensor]:
        """Their fp32 copies."""
        copies: dict[int, Tensor] = self._old.param_idx2hp
        return copies

    @property
    def active_parameters(self) -> list[OldMember]:
        """What is trained now, each with its fp32 copy."""
        pairs = zip(self.param_idx2lp.values(), self.param_idx2hp.values(), strict=True)
        return [OldMember(str(place), parameter, copy) for place, (parameter, copy) in enumerate(pairs)]

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # it returns nothing
        """One step, and the switch if it was the visit's last."""
        self._old.step()
        self._steps += 1
        if self._steps % self._every == 0:
            with phases.within(Phase.SWITCH), contextlib.redirect_stdout(io.StringIO()):
                self._old.switch_trainable_params(verbose=0)

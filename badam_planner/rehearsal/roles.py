"""What each layer of a model is and does while a block is active, and which blocks are alike."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from badam.blocks.names import belongs
from badam.plan import BlockPlan, Plan, Target
from badam.training.methods import method_of
from badam_planner.composition.compose import Run
from badam_planner.multi_gpu.engines import engine_of
from badam_planner.recording.kernel_scratch import Occupancy
from badam_planner.rehearsal.model_tree import ModelTree


@dataclass(frozen=True, slots=True)
class Role:
    """What a layer is, and what it does while a block is active."""

    kind: Hashable
    below: bool  # under every active parameter: no gradient comes here
    active: tuple[str, ...]  # its parameters in the active block, relative names
    checkpointed: bool


class Roles:
    """The roles of one model's layers, for every block that is asked about."""

    def __init__(self, tree: ModelTree) -> None:
        self.tree = tree
        self._known: dict[Hashable, tuple[Role, ...]] = {}
        self._own: dict[str, list[str]] = {layer: [] for layer in tree.layers}  # relative names of its parameters
        for info in tree.parameters:
            if layer := tree.layer_of(info.name):
                self._own[layer].append(info.name.removeprefix(layer))

    def question(self, plan: Plan, index: int, runs: Sequence[Run]) -> Hashable:
        """Equal for blocks that one rehearsal answers for: the same roles, runs of any length, the same training."""
        roles = self.of(plan, index)
        role_of = dict(zip(self.tree.layers, roles, strict=True))
        first = {run.cycles[0][0]: run for run in runs}
        inside = {layer for run in runs for cycle in run.cycles for layer in cycle}
        shape: list[Hashable] = []
        for layer in self.tree.layers:
            if layer in first:
                shape.append(("run", tuple(role_of[each] for each in first[layer].cycles[0])))
            elif layer not in inside:
                shape.append(role_of[layer])
        prefixes = self.trained(plan, index)
        elsewhere = tuple(path for path in prefixes if not self.tree.layer_of(path))
        return tuple(shape), elsewhere, plan.training.model_dump_json(), plan.method, rehearsed_device(plan.target)

    def of(self, plan: Plan, index: int) -> tuple[Role, ...]:
        """What each layer is and does while block number ``index`` is active."""
        prefixes, checkpointed_layers = self.trained(plan, index), plan.partition.blocks[index].checkpointed_layers
        key = (prefixes, checkpointed_layers)
        if key not in self._known:
            self._known[key] = self._found(prefixes, checkpointed_layers)
        return self._known[key]

    def trained(self, plan: Plan, index: int) -> tuple[str, ...]:
        """The module paths of all that is trained while block number ``index`` is active."""
        method = method_of(plan.method)
        blocks = (plan.partition.blocks[each] for each in method.active_blocks(plan, index))
        ends = self.tree.ends if method.trains_ends else ()
        return (*(prefix for block in blocks for prefix in block.prefixes), *ends, *plan.partition.active_modules)

    def _found(self, prefixes: Sequence[str], checkpointed_layers: Sequence[str]) -> tuple[Role, ...]:
        active = self._active_in_layers(prefixes)
        in_layers = [position for position, layer in enumerate(self.tree.layers) if layer in active]
        lowest = min(in_layers, default=len(self.tree.layers))
        if self.tree.embeds_among(prefixes):
            lowest = -1
        checkpointed = frozenset(checkpointed_layers)
        return tuple(
            Role(
                kind=self.tree.layer_kinds[layer],
                below=position < lowest,
                active=tuple(active.get(layer, ())),
                checkpointed=layer in checkpointed,
            )
            for position, layer in enumerate(self.tree.layers)
        )

    def _active_in_layers(self, prefixes: Sequence[str]) -> dict[str, list[str]]:
        """By layer its parameters under ``prefixes``, relative names. Few layers are looked into: there may be many."""
        homes = {self.tree.layer_of(prefix) for prefix in prefixes}
        active: dict[str, list[str]] = {}
        for layer in self._own if "" in homes else homes:
            names = [name for name in self._own[layer] if belongs(layer + name, prefixes)]
            if names:
                active[layer] = names
        return active

    def shape(self, plan: Plan, index: int) -> Hashable:
        """Equal for blocks that hold the same parameters of equal layers."""
        block, roles = plan.partition.blocks[index], self.of(plan, index)
        own = tuple((role.kind, role.active, role.checkpointed) for role in roles if role.active)
        return own, tuple(path for path in block.prefixes if not self.tree.layer_of(path))

    def entries_besides(self, plan: Plan, block: BlockPlan) -> int:
        """Entries that are trained in every visit and are not in ``block``."""
        always = plan.partition.active_modules
        return sum(
            info.numel
            for info in self.tree.parameters
            if belongs(info.name, always) and not belongs(info.name, block.prefixes)
        )


def trained_prefixes(plan: Plan, block: BlockPlan) -> tuple[str, ...]:
    """The module paths of what is trained while ``block`` is active."""
    return (*block.prefixes, *plan.partition.active_modules)


def rehearsed_device(target: Target) -> Hashable:
    """All of a target that a rehearsal depends on."""
    engine = engine_of(target)
    gpu = None if target.gpu == "cpu" else (target.workspace_bytes, Occupancy.of(target))
    return gpu, engine.has_own_linear, engine.joins_gpus

"""Ask the rehearsal what a plan's blocks need, as few times as the answer allows.

Blocks of one shape (the same parameters of equal layers) differ only in how many layers lie above and below them. More
layers above an active block mean more saved activations and nothing less, so of each shape the lowest block has the
highest peak; only it is rehearsed to find the worst block of a plan. Rehearsals keep four layers of every run of equal
ones and are composed to full depth (badam_planner.compose); with ``exact`` each is made at full depth.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from itertools import chain
from typing import TYPE_CHECKING, Any, overload

from badam.naming import belongs
from badam.partition import ParameterInfo, layer_stacks
from badam.plan import Attention, BlockPlan, Dtype, ModelSpec, Plan, Rates, Target, Training
from badam.training.methods import method_of
from badam.vocabulary import Phase
from badam_planner.compose import KEPT_CYCLES, NotPeriodic, Run, compose, composed_work, find_runs
from badam_planner.duration import Effort, Pace
from badam_planner.events import Flops, Recording
from badam_planner.forecast import Forecast, forecast
from badam_planner.outline import BlockPeaks, Outline
from badam_planner.probe.workers import run_all
from badam_planner.renaming import renamed, renamed_work

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPORTED_VERSIONS = ("badam", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class ModelTree:
    """What the planner needs of a module tree: names, shapes and places; no modules."""

    parameters: tuple[ParameterInfo, ...]  # distinct parameters, in model order
    layers: tuple[str, ...]  # module paths of the layers, in order of execution
    layer_kinds: dict[str, Hashable]  # equal for layers that may stand for each other
    layer_classes: tuple[type[Any], ...]  # of the layers
    head_module: str  # path of the output projection; "" if there is none
    can_chunk: bool  # whether the chunked loss knows this model
    versions: dict[str, str]

    def layer_of(self, path: str) -> str:
        """The layer that a module or parameter lies in, or "" if it is in none."""
        while path and path not in self.layer_kinds:
            path = path.rpartition(".")[0]
        return path

    def embeds_among(self, prefixes: Iterable[str]) -> bool:
        """Whether one of ``prefixes`` holds a parameter that comes before every layer."""
        for info in self.parameters:
            if self.layer_of(info.name):
                return False
            if belongs(info.name, prefixes):
                return True
        return False


@dataclass(frozen=True, slots=True)
class Role:
    """What a layer is, and what it does while a block is active."""

    kind: Hashable
    below: bool  # under every active parameter: no gradient comes here
    active: tuple[str, ...]  # its parameters in the active block, relative names
    checkpointed: bool


@dataclass(frozen=True, slots=True)
class PlanForecast:
    """What is predicted for the blocks of a plan."""

    worst_block: int
    worst: Forecast
    backward_relative: tuple[float, ...]  # by block: backward work over that of training everything
    trained_entries: int = 0  # entries trained at a time, at most
    blocks: tuple[BlockPeaks, ...] = ()  # by block, or empty if only the worst was asked for
    efforts: tuple[dict[Phase, Effort], ...] = ()  # by block: of one optimizer step; the switch of a whole visit


def inspect_model(spec: ModelSpec, attention: Attention) -> ModelTree:
    """Build the module tree on fake tensors and note what planning needs of it."""
    from badam.errors import InputError
    from badam.training.losses import check_chunked
    from badam_planner.probe.rehearse import fake_model, fake_world

    with fake_world():
        model = fake_model(spec, Training(batch_size=1, seq_len=1, attention=attention))
        beside = _beside_the_text(model)
        parameters = tuple(
            ParameterInfo(name, tuple(tensor.shape))
            for name, tensor in model.named_parameters()
            if not belongs(name, beside)
        )
        stacks = layer_stacks([info.name for info in parameters])
        kinds: dict[str, Hashable] = {}
        types = getattr(model.config.get_text_config(), "layer_types", None) or ()
        for stack in stacks:
            for position, path in enumerate(stack):
                layer = model.get_submodule(path)
                shapes = tuple((name, tuple(tensor.shape)) for name, tensor in layer.named_parameters())
                kind = types[position] if position < len(types) else None
                kinds[path] = (path.rpartition(".")[0], type(layer).__name__, kind, shapes)
        head = model.get_output_embeddings()
        names = {id(module): name for name, module in model.named_modules()}
        try:
            check_chunked(model)
            can_chunk = True
        except InputError:
            can_chunk = False
    return ModelTree(
        parameters=parameters,
        layers=tuple(path for stack in stacks for path in stack),
        layer_kinds=kinds,
        layer_classes=tuple(type(model.get_submodule(path)) for stack in stacks for path in stack),
        head_module=names.get(id(head), ""),
        can_chunk=can_chunk,
        versions={name: version(name) for name in REPORTED_VERSIONS},
    )


def _beside_the_text(model: PreTrainedModel) -> tuple[str, ...]:
    """Paths of the modules that a batch of text does not pass through: towers for images or sound, their projectors."""
    if model.config.get_text_config() is model.config:
        return ()
    names = {id(module): name for name, module in model.named_modules()}
    used = [names.get(id(module), "") for module in (model.get_decoder(), model.get_output_embeddings())]
    around = {path.rpartition(".")[0] for path in used if path}
    return tuple(
        name
        for name, _ in model.named_modules()
        if name and name.rpartition(".")[0] in around and not any(belongs(path, (name,)) for path in used if path)
    )


@dataclass(slots=True)
class _Rehearsed:
    """A rehearsal with four cycles of each run of equal layers."""

    recording: Recording
    names: list[str]  # its layers in order, see _names
    runs: list[tuple[tuple[str, ...], ...]]  # the four cycles of each run, by these names
    outlines: dict[Hashable, Outline] = field(default_factory=dict)
    paces: dict[Hashable, Pace] = field(default_factory=dict)

    def outline(self, target: Target) -> Outline:
        """Its outline for a device, read once."""
        key = (target.gpu == "cpu", target.workspace_bytes)
        if key not in self.outlines:
            self.outlines[key] = Outline(self.recording, self.runs, target)
        return self.outlines[key]

    def pace(self, rates: Rates | None, dtype: Dtype) -> Pace:
        """Its pace at given rates, read once."""
        key = (rates and rates.model_dump_json(), dtype)
        if key not in self.paces:
            self.paces[key] = Pace(self.recording, self.runs, rates, dtype)
        return self.paces[key]


class Evaluator:
    """Rehearses blocks of plans for one model; a rehearsal that answers for several blocks is made once."""

    def __init__(self, tree: ModelTree, *, exact: bool = False, workers: int = 1) -> None:
        """Answer for one model.

        Args:
            tree: of the model.
            exact: rehearse every block at full depth.
            workers: processes that :meth:`prepare` may use.
        """
        self.tree = tree
        self.workers = workers
        self.exact = exact
        self._rehearsed: dict[Hashable, _Rehearsed] = {}
        self._trained: dict[str, int] = {}
        self._known_roles: dict[Hashable, tuple[Role, ...]] = {}
        self._own: dict[str, list[str]] = {layer: [] for layer in tree.layers}  # relative names of its parameters
        for info in tree.parameters:
            if layer := tree.layer_of(info.name):
                self._own[layer].append(info.name.removeprefix(layer))

    @overload
    def worst_block(self, plan: Plan) -> PlanForecast: ...
    @overload
    def worst_block(self, plan: Plan, *, give_up_above: int | None) -> PlanForecast | None: ...
    def worst_block(self, plan: Plan, *, give_up_above: int | None = None) -> PlanForecast | None:
        """Forecast the lowest block of each shape, and take the one with the highest device peak.

        Args:
            plan: the plan.
            give_up_above: device bytes; as soon as one block needs more, the answer is None.
        """
        if not method_of(plan.method).composes:
            return self._without_roles(plan, give_up_above)
        shapes = [self._shape(plan, block) for block in plan.partition.blocks]
        lowest = {shape: shapes.index(shape) for shape in shapes}
        peaks: dict[int, BlockPeaks] = {}
        for index in self.decisive(plan):
            if len(peaks) == 1:
                self.prepare((plan, other) for other in self.decisive(plan))
            peaks[index] = self.peaks(plan, index)
            if (
                give_up_above is not None
                and peaks[index].peak_allocated_bytes + plan.target.context_bytes > give_up_above
            ):
                return None
        forecasts = {index: self._forecast(plan, index) for index in _worth_simulating(peaks)}
        worst = max(forecasts, key=lambda index: (forecasts[index].peak_device_bytes, -index))
        if give_up_above is not None and forecasts[worst].peak_device_bytes > give_up_above:
            return None
        flops = {index: self.flops(plan, index) for index in peaks}
        relative = backward_relative(plan, self.tree, flops, [lowest[shape] for shape in shapes])
        largest = max(block.parameters + self._besides(plan, block) for block in plan.partition.blocks)
        return PlanForecast(worst, forecasts[worst], relative, largest)

    def decisive(self, plan: Plan) -> list[int]:
        """The blocks that must be rehearsed to find a plan's worst: the lowest of each shape, the largest first."""
        shapes = [self._shape(plan, block) for block in plan.partition.blocks]
        return sorted(
            (shapes.index(shape) for shape in dict.fromkeys(shapes)),
            key=lambda index: -plan.partition.blocks[index].parameters,
        )

    def _forecast(self, plan: Plan, index: int) -> Forecast:
        return forecast(self.recording(plan, index), plan.target, head_module=self.tree.head_module)

    def _without_roles(self, plan: Plan, give_up_above: int | None) -> PlanForecast | None:
        """Rehearse the first and the last block at full depth, for methods that train more than the block.

        What is trained besides reaches through all layers, so blocks differ only in when their gradients and saved
        inputs come and go: the lowest keeps most activations until last, the highest has its gradients first.
        """
        forecasts = {index: self._forecast(plan, index) for index in {0, len(plan.partition.blocks) - 1}}
        worst = max(forecasts, key=lambda index: (forecasts[index].peak_device_bytes, -index))
        if give_up_above is not None and forecasts[worst].peak_device_bytes > give_up_above:
            return None
        relative = (backward_of_all(self.flops(plan, worst)),) * len(plan.partition.blocks)
        return PlanForecast(worst, forecasts[worst], relative, self._trained_entries(plan))

    def _trained_entries(self, plan: Plan) -> int:
        from badam_planner.probe.rehearse import trained_entries

        key = f"{plan.method} {plan.training.options.model_dump_json()}"
        if key not in self._trained:
            self._trained[key] = trained_entries(plan)
        return self._trained[key]

    def every_block(self, plan: Plan, known: PlanForecast) -> PlanForecast:
        """The peaks of all blocks of a plan whose worst block is ``known``; none if they are not trained one by one.

        On a card the worst block's figure is that of the simulated allocator; those of the others leave out the ends
        of the allocator's blocks that are too small to be split off, some thousandths.
        """
        worst = BlockPeaks(known.worst.peak_allocated_bytes, known.worst.peak_phase, known.worst.by_phase)
        indices = range(len(plan.partition.blocks))
        if not method_of(plan.method).composes:
            efforts = self.efforts(plan, known.worst_block)
            blocks = (worst,) if len(indices) == 1 else ()
            return replace(known, blocks=blocks, efforts=(efforts,) * len(indices))
        peaks = {known.worst_block: worst}
        middle = len(indices) / 2
        from_the_middle = sorted(indices, key=lambda index: abs(index - middle))  # these answer for others
        self.prepare((plan, index) for index in from_the_middle[:1])
        self.prepare((plan, index) for index in from_the_middle)
        for index in from_the_middle:
            if index not in peaks:
                peaks[index] = self.peaks(plan, index)
        return replace(
            known,
            blocks=tuple(peaks[index] for index in indices),
            efforts=tuple(self.efforts(plan, index) for index in indices),
        )

    def efforts(self, plan: Plan, index: int) -> dict[Phase, Effort]:
        """Work and time by phase of one optimizer step with one block active; the switch is that of a whole visit."""
        rates, dtype = plan.target.rates, plan.training.dtype
        if not self.exact and method_of(plan.method).composes:
            rehearsed, runs = self._rehearsal(plan, index)
            return rehearsed.pace(rates, dtype).efforts([len(run.cycles) for run in runs])
        return Pace(self.recording(plan, index), (), rates, dtype).efforts(())

    def peaks(self, plan: Plan, index: int) -> BlockPeaks:
        """The highest allocated bytes with one block active: every tensor's bytes, rounded as the device does."""
        if not self.exact and method_of(plan.method).composes:
            rehearsed, runs = self._rehearsal(plan, index)
            try:
                return rehearsed.outline(plan.target).peaks([len(run.cycles) for run in runs])
            except NotPeriodic:
                pass
        return Outline(self.recording(plan, index), (), plan.target).peaks(())

    def flops(self, plan: Plan, index: int) -> Flops:
        """Operations of matrix products at full depth, by phase and module."""
        if not self.exact and method_of(plan.method).composes:
            rehearsed, runs = self._rehearsal(plan, index)
            flops = renamed_work(rehearsed.recording.flops, self._new_names(rehearsed, runs))
            for run in runs:
                flops = composed_work(flops, run)
            return flops
        return self.recording(plan, index).flops

    def recording(self, plan: Plan, index: int) -> Recording:
        """The rehearsal of one block at full depth, composed where that is possible and not forbidden."""
        if not self.exact and method_of(plan.method).composes:
            rehearsed, runs = self._rehearsal(plan, index)
            try:
                recording = renamed(rehearsed.recording, self._new_names(rehearsed, runs))
                for run in runs:
                    recording = compose(recording, run)
                return recording
            except NotPeriodic:
                pass
        return self._at_full_depth(plan, index)

    def _at_full_depth(self, plan: Plan, index: int) -> Recording:
        from badam_planner.probe.rehearse import rehearse

        key = (
            "full depth",
            plan.partition.blocks[index].model_dump_json(),
            plan.training.model_dump_json(),
            plan.method,
            plan.target.gpu == "cpu",
        )
        if key not in self._rehearsed:
            recording = rehearse(plan, index, layers=self.tree.layers)
            self._rehearsed[key] = _Rehearsed(recording, [], [])
        return self._rehearsed[key].recording

    def prepare(self, wanted: Iterable[tuple[Plan, int]]) -> None:
        """Rehearse ahead what questions on these blocks (plan, index) will need, on all workers at a time."""
        jobs: dict[Hashable, Callable[[], _Rehearsed]] = {}
        for plan, index in wanted:
            if not self.exact and method_of(plan.method).composes:
                key, runs = self._key_and_runs(plan, index)
                if key not in self._rehearsed:
                    jobs.setdefault(key, partial(self._rehearse, plan, index, runs))
        if len(jobs) > 1 and not self._rehearsed:  # the first one loads code that the others then have
            key = next(iter(jobs))
            self._rehearsed[key] = jobs.pop(key)()
        self._rehearsed.update(zip(jobs, run_all(list(jobs.values()), self.workers), strict=True))

    def _rehearsal(self, plan: Plan, index: int) -> tuple[_Rehearsed, list[Run]]:
        """A rehearsal with four cycles of each run of equal layers, and the runs that it is to be composed to."""
        key, runs = self._key_and_runs(plan, index)
        if key not in self._rehearsed:
            self._rehearsed[key] = self._rehearse(plan, index, runs)
        return self._rehearsed[key], runs

    def _key_and_runs(self, plan: Plan, index: int) -> tuple[Hashable, list[Run]]:
        """Which rehearsal answers for a block, and the runs that it is to be composed to."""
        roles = self._roles(plan, plan.partition.blocks[index])
        runs = find_runs(self.tree.layers, [None if role.active else role for role in roles])
        key = self._question(plan, index, roles, runs)
        complete = all(len(run.cycles) >= KEPT_CYCLES for run in runs)
        if key not in self._rehearsed and not complete:
            runs = [run for run in runs if len(run.cycles) > KEPT_CYCLES]  # the short ones are rehearsed as they are
            key = self._question(plan, index, roles, runs)
        return key, runs

    def _rehearse(self, plan: Plan, index: int, runs: Sequence[Run]) -> _Rehearsed:
        from badam_planner.probe.rehearse import rehearse

        layers = self.tree.layers
        without = dict(chain.from_iterable(run.left_out.items() for run in runs))
        recording = rehearse(plan, index, layers=layers, classes=self.tree.layer_classes, without=without)
        return _Rehearsed(recording, _names(layers, runs), [run.stand_ins() for run in runs])

    def _new_names(self, rehearsed: _Rehearsed, runs: Sequence[Run]) -> dict[str, str]:
        return dict(zip(rehearsed.names, _names(self.tree.layers, runs), strict=True))

    def _question(self, plan: Plan, index: int, roles: Sequence[Role], runs: Sequence[Run]) -> Hashable:
        """Equal for blocks that one rehearsal answers for: the same roles, runs of any length, the same training."""
        role_of = dict(zip(self.tree.layers, roles, strict=True))
        first = {run.cycles[0][0]: run for run in runs}
        inside = {layer for run in runs for cycle in run.cycles for layer in cycle}
        shape: list[Hashable] = []
        for layer in self.tree.layers:
            if layer in first:
                shape.append(("run", tuple(role_of[each] for each in first[layer].cycles[0])))
            elif layer not in inside:
                shape.append(role_of[layer])
        prefixes = trained_prefixes(plan, plan.partition.blocks[index])
        elsewhere = tuple(path for path in prefixes if not self._layer_of(path))
        return tuple(shape), elsewhere, plan.training.model_dump_json(), plan.method, plan.target.gpu == "cpu"

    def _roles(self, plan: Plan, block: BlockPlan) -> tuple[Role, ...]:
        """What each layer is and does while ``block`` is active."""
        prefixes = trained_prefixes(plan, block)
        key = (prefixes, block.checkpointed_layers)
        if key not in self._known_roles:
            self._known_roles[key] = self._found_roles(prefixes, block.checkpointed_layers)
        return self._known_roles[key]

    def _found_roles(self, prefixes: Sequence[str], checkpointed_layers: Sequence[str]) -> tuple[Role, ...]:
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
        homes = {self._layer_of(prefix) for prefix in prefixes}
        active: dict[str, list[str]] = {}
        for layer in self._own if "" in homes else homes:
            names = [name for name in self._own[layer] if belongs(layer + name, prefixes)]
            if names:
                active[layer] = names
        return active

    def _shape(self, plan: Plan, block: BlockPlan) -> Hashable:
        """Equal for blocks that hold the same parameters of equal layers."""
        roles = self._roles(plan, block)
        own = tuple((role.kind, role.active, role.checkpointed) for role in roles if role.active)
        return own, tuple(path for path in block.prefixes if not self._layer_of(path))

    def _besides(self, plan: Plan, block: BlockPlan) -> int:
        """Entries that are trained in every visit and are not in ``block``."""
        always = plan.partition.active_modules
        return sum(
            info.numel
            for info in self.tree.parameters
            if belongs(info.name, always) and not belongs(info.name, block.prefixes)
        )

    def _layer_of(self, path: str) -> str:
        return self.tree.layer_of(path)


def _worth_simulating(peaks: Mapping[int, BlockPeaks]) -> list[int]:
    """The blocks whose tensors come near the highest peak, so that the allocator's share may decide between them.

    Near is a tenth of what a step adds to what is there before it: only that can be fragmented.
    """
    highest = max(peaks.values(), key=lambda block: block.peak_allocated_bytes)
    resident = highest.by_phase.get(Phase.SETUP, 0)
    bar = highest.peak_allocated_bytes - 0.1 * (highest.peak_allocated_bytes - resident)
    return [index for index, block in peaks.items() if block.peak_allocated_bytes >= bar]


def trained_prefixes(plan: Plan, block: BlockPlan) -> tuple[str, ...]:
    """The module paths of what is trained while ``block`` is active."""
    return (*block.prefixes, *plan.partition.active_modules)


def _names(layers: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """The layers of a rehearsal in order, runs as the four cycles that they are composed from."""
    first = {run.cycles[0][0]: run for run in runs}
    inside = {layer for run in runs for cycle in run.cycles for layer in cycle}
    names: list[str] = []
    for layer in layers:
        if layer in first:
            names += [each for cycle in first[layer].stand_ins() for each in cycle]
        elif layer not in inside:
            names.append(layer)
    return names


def backward_relative(
    plan: Plan, tree: ModelTree, flops: Mapping[int, Flops], representatives: Sequence[int]
) -> tuple[float, ...]:
    """Matrix-product operations of backward with each block active, over those with everything active.

    Formula: a block's own rehearsal less the layers between it and the block of its shape that was rehearsed, each as
    it passes gradients through. Training everything adds to every layer the products that make its weights'
    gradients: as many as forward has with these weights. Recomputation counts.
    Units: none. Source: 2 m n k operations per product, ``torch.utils.flop_counter``.
    Not counted: operations that are bound by memory and not by arithmetic.

    Args:
        plan: the partition.
        tree: the layers.
        flops: those of rehearsals at full depth, by index of the active block.
        representatives: for each block of the plan the index of the one that was rehearsed in its place.
    """
    if [block.parameters for block in plan.partition.blocks] == [sum(info.numel for info in tree.parameters)]:
        return (1.0,)  # the one block is everything
    tallies = {index: _backward_flops(each, tree) for index, each in flops.items()}
    positions = [_lowest_layer(trained_prefixes(plan, block), tree) for block in plan.partition.blocks]
    reference = min(flops, key=lambda index: positions[index])
    through = _passing_through(tallies[reference], positions[reference], tree)
    outside = tallies[reference].get("", 0)
    everything = outside + sum(through) + _weight_gradient_flops(flops[reference], tree)
    relative = []
    for index, stand_in in enumerate(representatives):
        between = sum(through[positions[stand_in] + 1 : positions[index] + 1])
        relative.append((sum(tallies[stand_in].values()) - between) / everything)
    return tuple(relative)


def backward_of_all(flops: Flops) -> float:
    """Matrix-product operations of backward, over those of training every weight.

    Formula: (backward + recomputation) / (2 (forward + loss) + recomputation), since the gradient of a product is two
    products of its size. Units: none. Not counted: the third product in the backward of fused attention.
    """
    tally: dict[Phase, int] = {}
    for (phase, _), count in flops.items():
        tally[phase] = tally.get(phase, 0) + count
    again = tally.get(Phase.RECOMPUTE, 0)
    ahead = tally.get(Phase.FORWARD, 0) + tally.get(Phase.LOSS, 0)
    return (tally.get(Phase.BACKWARD, 0) + again) / (2 * ahead + again) if ahead else 0.0


def _backward_flops(flops: Flops, tree: ModelTree) -> dict[str, int]:
    """Operations of backward and recomputation by layer; those outside of every layer under ""."""
    tally: dict[str, int] = {}
    for (phase, module), count in flops.items():
        if phase in (Phase.BACKWARD, Phase.RECOMPUTE):
            layer = tree.layer_of(module)
            tally[layer] = tally.get(layer, 0) + count
    return tally


def _passing_through(tally: dict[str, int], lowest: int, tree: ModelTree) -> list[int]:
    """Operations of each layer that only passes gradients through; layers at or below ``lowest`` as their equals."""
    by_kind = {tree.layer_kinds[layer]: tally.get(layer, 0) for layer in tree.layers[lowest + 1 :]}
    return [
        tally.get(layer, 0) if position > lowest else by_kind.get(tree.layer_kinds[layer], tally.get(layer, 0))
        for position, layer in enumerate(tree.layers)
    ]


def _weight_gradient_flops(flops: Flops, tree: ModelTree) -> int:
    """Operations that make the gradients of all weights: those of forward in the modules that own weights."""
    owners = {info.name.rpartition(".")[0] for info in tree.parameters}
    forward = (Phase.FORWARD, Phase.LOSS)
    return sum(count for (phase, module), count in flops.items() if phase in forward and module in owners)


def _lowest_layer(prefixes: Sequence[str], tree: ModelTree) -> int:
    """Position of the lowest layer that backward reaches: the lowest trained one, or beyond the last for a head."""
    if tree.embeds_among(prefixes):
        return -1
    inside = {tree.layer_of(path) for path in prefixes}
    return next((position for position, layer in enumerate(tree.layers) if layer in inside), len(tree.layers))

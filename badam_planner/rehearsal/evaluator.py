"""Ask the rehearsal what a plan's blocks need, as few times as the answer allows.

Blocks of one shape (the same parameters of equal layers) differ only in how many layers lie above and below them. More
layers above an active block mean more saved activations and nothing less, so of each shape the lowest block has the
highest peak; only it is rehearsed to find the worst block of a plan. Rehearsals keep four layers of every run of equal
ones and are composed to full depth (badam_planner.composition.compose); with ``exact`` each is made at full depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, overload

from badam.blocks.names import belongs
from badam.plan import Plan
from badam.training.methods import method_of
from badam.vocabulary import Phase
from badam_planner.composition.compose import KEPT_CYCLES, NotPeriodic, Run, find_runs
from badam_planner.composition.peaks import BlockPeaks, DepthPeaks
from badam_planner.composition.short_rehearsal import Rehearsal, Rehearsed
from badam_planner.composition.sizes import NoFamily, Size, SizeFamily, SizeRange, ranges_of
from badam_planner.composition.step_time import StepTimes, Work
from badam_planner.multi_gpu.engines import engine_of
from badam_planner.multi_gpu.fsdp2 import Sharding, sharding_of
from badam_planner.multi_gpu.traffic import Traffic
from badam_planner.recording.forecast import Forecast, cache_releases, forecast_visits, timeline_on
from badam_planner.recording.recording import Entries, Flops, Recording
from badam_planner.recording.timeline import Timeline
from badam_planner.rehearsal.model_tree import ModelTree
from badam_planner.rehearsal.relative_backward import backward_of_all, backward_relative
from badam_planner.rehearsal.roles import Roles, rehearsed_device, trained_prefixes
from badam_planner.rehearsal.workers import run_all


@dataclass(frozen=True, slots=True)
class PlanForecast:
    """What is predicted for the blocks of a plan."""

    worst_block: int
    worst: Forecast
    backward_relative: tuple[float, ...]  # by block: backward work over that of training everything
    trained_entries: int = 0  # entries trained at a time, at most
    quantized_entries: int = 0  # entries of the weights that are kept in fewer than 16 bits
    blocks: tuple[BlockPeaks, ...] = ()  # by block, or empty if only the worst was asked for
    work_by_phase: tuple[dict[Phase, Work], ...] = ()  # by block: of one optimizer step; the switch of a whole visit
    visited: tuple[int, ...] = ()  # the blocks whose visits in turns were simulated


_Sized = tuple[Rehearsed, Sequence[int] | None]
"""A rehearsal, or the pattern of many sizes and the numbers of one of them."""


KEPT_RECORDINGS = 24
"""Of one of several GPUs at full depth, some megabytes each: those that a partition's settings have in common."""


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
        self._rehearsed: dict[Hashable, _Sized] = {}
        self._whole: dict[Hashable, Recording] = {}  # rehearsed at full depth
        self._per_rank: dict[Hashable, Recording] = {}  # on one of several GPUs, the last ones
        self._counted: dict[str, Entries] = {}
        self._roles = Roles(tree)
        self._ranges: tuple[SizeRange, ...] = ()
        self._families: dict[Hashable, tuple[SizeFamily, Rehearsed] | None] = {}

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
        if not method_of(plan.method).trains_one_block:
            return self._without_roles(plan, give_up_above)
        shapes = [self._roles.shape(plan, index) for index in range(len(plan.partition.blocks))]
        lowest = {shape: shapes.index(shape) for shape in shapes}
        peaks: dict[int, BlockPeaks] = {}
        decisive = self.decisive(plan)
        # Alone on a GPU a block takes less than a fork; on several, a part of a second, and there are up to dozens.
        workers = self.workers if engine_of(plan.target).joins_gpus else 1
        for index in decisive:
            if len(peaks) == 1:
                self.prepare((plan, other) for other in decisive)
                if workers > 1:
                    others = decisive[1:]
                    found = run_all([partial(self.peaks, plan, other) for other in others], workers)
                    peaks |= zip(others, found, strict=True)
            if index not in peaks:
                peaks[index] = self.peaks(plan, index)
            if give_up_above is not None and self._is_too_large(plan, index, peaks[index], give_up_above):
                return None
        visited = sorted({*_worth_simulating(peaks), *self._of_each_kind(plan, peaks)})
        worst, highest = self._forecast(plan, visited, workers)
        if give_up_above is not None and highest.peak_device_bytes > give_up_above:
            return None
        flops = {index: self.flops(plan, index) for index in peaks}
        relative = backward_relative(plan, self.tree, flops, [lowest[shape] for shape in shapes])
        largest = max(block.parameters + self._roles.entries_besides(plan, block) for block in plan.partition.blocks)
        return PlanForecast(worst, highest, relative, largest, visited=tuple(visited))

    def _is_too_large(self, plan: Plan, index: int, peaks: BlockPeaks, limit_bytes: int) -> bool:
        """Whether one block alone needs more than the limit; of the largest also with the allocator's share.

        On several GPUs every other block would have to be composed before its tensors were all known.
        """
        if peaks.peak_allocated_bytes + plan.target.outside_bytes > limit_bytes:
            return True
        if not engine_of(plan.target).joins_gpus or index != self.decisive(plan)[0]:
            return False
        return self._forecast_alone(plan, index).peak_device_bytes > limit_bytes

    def device_bytes_of_largest(self, plan: Plan) -> int:
        """What the largest block needs: near what the worst one does, for far less work."""
        return self._forecast_alone(plan, self.decisive(plan)[0]).peak_device_bytes

    def decisive(self, plan: Plan) -> list[int]:
        """The blocks that must be rehearsed to find a plan's worst: the lowest of each shape, the largest first."""
        shapes = [self._roles.shape(plan, index) for index in range(len(plan.partition.blocks))]
        return sorted(
            (shapes.index(shape) for shape in dict.fromkeys(shapes)),
            key=lambda index: -plan.partition.blocks[index].parameters,
        )

    def _of_each_kind(self, plan: Plan, peaks: Mapping[int, BlockPeaks]) -> list[int]:
        """Of the blocks whose states have the same sizes the one with the highest peak: others leave other segments."""
        kinds: dict[Hashable, int] = {}
        for index in sorted(peaks, key=lambda index: -peaks[index].peak_allocated_bytes):
            prefixes = self._roles.trained(plan, index)
            sizes = sorted(math.prod(one.shape) for one in self.tree.parameters if belongs(one.name, prefixes))
            kinds.setdefault(tuple(sizes), index)
        return list(kinds.values()) if plan.target.gpu != "cpu" and not engine_of(plan.target).joins_gpus else []

    def _forecast(self, plan: Plan, visited: Sequence[int], workers: int = 1) -> tuple[int, Forecast]:
        """The forecast of visits to these blocks in turns, and which of them has the highest peak."""
        if engine_of(plan.target).joins_gpus:  # rehearsals of a step, and not of a visit
            alone = run_all([partial(self._forecast_alone, plan, index) for index in visited], workers)
            worst = max(range(len(alone)), key=lambda place: (alone[place].peak_device_bytes, -place))
            return visited[worst], alone[worst]
        found = forecast_visits([self._timeline(plan, index) for index in visited], plan.target)
        return visited[found.worst], found.forecast

    def _forecast_alone(self, plan: Plan, index: int) -> Forecast:
        return forecast_visits([self._timeline(plan, index)], plan.target).forecast

    def _timeline(self, plan: Plan, index: int) -> Timeline:
        if self._composes(plan) and not engine_of(plan.target).joins_gpus:
            with suppress(NotPeriodic):
                return self._rehearsal(plan, index).timeline(plan.target, self.tree.head_module)
        return timeline_on(self.recording(plan, index), plan.target, self.tree.head_module)

    def cache_releases(self, plan: Plan, known: PlanForecast) -> float | None:
        """How often per step a plan gives back cached segments to stay within its GPU; None if it runs out even so.

        None too where there is no such cache (on the CPU), and on several GPUs, whose rehearsals are of one step.
        """
        if plan.target.gpu == "cpu" or engine_of(plan.target).joins_gpus:
            return None
        return cache_releases([self._timeline(plan, index) for index in known.visited], plan.target)

    def _without_roles(self, plan: Plan, give_up_above: int | None) -> PlanForecast | None:
        """Rehearse the first and the last block, for methods that train more than the block.

        What is trained besides reaches through all layers, so blocks differ only in when their gradients and saved
        inputs come and go: the lowest keeps most activations until last, the highest has its gradients first.
        """
        visited = sorted({0, len(plan.partition.blocks) - 1})
        worst, found = self._forecast(plan, visited)
        if give_up_above is not None and found.peak_device_bytes > give_up_above:
            return None
        relative = (backward_of_all(self.flops(plan, worst)),) * len(plan.partition.blocks)
        return PlanForecast(worst, found, relative, *self._entries(plan), visited=tuple(visited))

    def _entries(self, plan: Plan) -> Entries:
        from badam_planner.rehearsal.rehearse import count_entries

        key = f"{plan.method} {plan.training.options.model_dump_json()} {plan.partition.model_dump_json()}"
        if key not in self._counted:
            runs = self._key_and_runs(plan, 0)[1] if self._composes(plan) else []
            self._counted[key] = count_entries(plan, layers=self.tree.layers, **self._left_out(runs))
        return self._counted[key]

    def every_block(self, plan: Plan, known: PlanForecast) -> PlanForecast:
        """The peaks of all blocks of a plan whose worst block is ``known``; none if they are not trained one by one.

        On a GPU the worst block's figure is that of the simulated allocator; those of the others leave out the ends
        of the allocator's blocks that are too small to be split off, some thousandths.
        """
        worst = BlockPeaks(known.worst.peak_allocated_bytes, known.worst.peak_phase, known.worst.by_phase)
        indices = range(len(plan.partition.blocks))
        if not method_of(plan.method).trains_one_block:
            work_by_phase = self.work_by_phase(plan, known.worst_block)
            blocks = (worst,) if len(indices) == 1 else ()
            return replace(known, blocks=blocks, work_by_phase=(work_by_phase,) * len(indices))
        peaks = {known.worst_block: worst}
        middle = len(indices) / 2
        from_the_middle = sorted(indices, key=lambda index: abs(index - middle))  # these answer for others
        self.prepare((plan, index) for index in from_the_middle[:1])
        self.prepare((plan, index) for index in from_the_middle)
        left = [index for index in from_the_middle if index not in peaks]
        workers = self.workers if engine_of(plan.target).joins_gpus else 1  # alone, a block takes less than a fork
        peaks |= zip(left, run_all([partial(self.peaks, plan, index) for index in left], workers), strict=True)
        return replace(
            known,
            blocks=tuple(peaks[index] for index in indices),
            work_by_phase=tuple(self.work_by_phase(plan, index) for index in indices),
        )

    def work_by_phase(self, plan: Plan, index: int) -> dict[Phase, Work]:
        """Work and time by phase of one optimizer step with one block active; the switch is that of a whole visit."""
        rates, dtype = plan.target.rates, plan.training.dtype
        if self._composes(plan):
            return self._rehearsal(plan, index).work_by_phase(rates, dtype)
        return StepTimes(self.recording(plan, index), (), rates, dtype).work_by_phase(())

    def peaks(self, plan: Plan, index: int) -> BlockPeaks:
        """The highest allocated bytes with one block active: every tensor's bytes, rounded as the device does."""
        if self._composes(plan) and not engine_of(plan.target).joins_gpus:
            with suppress(NotPeriodic):
                return self._rehearsal(plan, index).peaks(plan.target)
        return DepthPeaks(self.recording(plan, index), (), plan.target).peaks(())

    def flops(self, plan: Plan, index: int) -> Flops:
        """Operations of matrix products at full depth, by phase and module."""
        return self._rehearsal(plan, index).flops() if self._composes(plan) else self._alone(plan, index).flops

    def recording(self, plan: Plan, index: int) -> Recording:
        """What happens on one of the plan's GPUs with one block active, at full depth."""
        engine = engine_of(plan.target)
        if not engine.joins_gpus:
            return self._alone(plan, index)
        target = plan.target.model_copy(update={"expandable_segments": False, "usable_bytes": 0})  # as the recording
        block, modules = plan.partition.blocks[index], plan.partition.active_modules
        key = (block.model_dump_json(), modules, plan.training.model_dump_json(), target.model_dump_json())
        if key not in self._per_rank:
            while len(self._per_rank) >= KEPT_RECORDINGS:
                del self._per_rank[next(iter(self._per_rank))]  # the oldest
            self._per_rank[key] = engine.per_rank(self._alone(plan, index), plan, self._sharding(plan, index))
        return self._per_rank[key]

    def traffic(self, plan: Plan, index: int) -> tuple[Traffic, Traffic] | None:
        """What each GPU sends in a step with one block active, and what it would if all were; None if it is alone."""
        return engine_of(plan.target).traffic(self._alone(plan, index), plan, self._sharding(plan, index))

    def host_bytes(self, plan: Plan) -> int | None:
        """What each process keeps in host memory, at most over the blocks; None if nothing is offloaded."""
        if plan.target.offload == "none":
            return None
        engine = engine_of(plan.target)
        shardings = (self._sharding(plan, index) for index in range(len(plan.partition.blocks)))
        kept = (engine.host_bytes(sharding, plan.target.offload) for sharding in shardings)
        return max((nbytes for nbytes in kept if nbytes is not None), default=None)

    def _sharding(self, plan: Plan, index: int) -> Sharding:
        tree, prefixes = self.tree, trained_prefixes(plan, plan.partition.blocks[index])
        trained = frozenset(info.name for info in tree.parameters if belongs(info.name, prefixes))
        return sharding_of(
            plan, parameters=tree.parameters, layers=tree.layers, head_module=tree.head_module, trained=trained
        )

    def _alone(self, plan: Plan, index: int) -> Recording:
        """The rehearsal of one block on a GPU that trains alone, composed where that is possible and not forbidden."""
        if self._composes(plan):
            with suppress(NotPeriodic):
                return self._rehearsal(plan, index).recording()
        return self._at_full_depth(plan, index)

    def _composes(self, plan: Plan) -> bool:
        return not self.exact and method_of(plan.method).treats_layers_alike(plan)

    def _at_full_depth(self, plan: Plan, index: int) -> Recording:
        from badam_planner.rehearsal.rehearse import rehearse

        key = (
            plan.partition.blocks[index].model_dump_json(),
            plan.training.model_dump_json(),
            plan.method,
            rehearsed_device(plan.target),
        )
        if key not in self._whole:
            self._whole[key] = rehearse(plan, index, layers=self.tree.layers)
        return self._whole[key]

    def prepare(self, wanted: Iterable[tuple[Plan, int]]) -> None:
        """Rehearse ahead what questions on these blocks (plan, index) will need, on all workers at a time."""
        jobs: dict[Hashable, tuple[list[Run], Callable[[], Recording]]] = {}
        for plan, index in wanted:
            if self._composes(plan):
                key, runs = self._key_and_runs(plan, index)
                if key not in self._rehearsed and not self._ranges:  # the probes of a range share the workers
                    jobs.setdefault(key, (runs, partial(self._record, plan, index, runs)))
        recordings = run_all([record for _, record in jobs.values()], self.workers)
        for (key, (runs, _)), recording in zip(jobs.items(), recordings, strict=True):
            self._rehearsed[key] = (Rehearsed.of(recording, self.tree.layers, runs), None)

    def _rehearsal(self, plan: Plan, index: int) -> Rehearsal:
        """What a rehearsal with four cycles of each run of equal layers says of a block."""
        key, runs = self._key_and_runs(plan, index)
        if key not in self._rehearsed:
            self._rehearsed[key] = self._from_family(plan, index, runs) or self._by_itself(plan, index, runs)
        rehearsed, numbers = self._rehearsed[key]
        return Rehearsal(rehearsed, self.tree.layers, runs, numbers)

    def _key_and_runs(self, plan: Plan, index: int) -> tuple[Hashable, list[Run]]:
        """Which rehearsal answers for a block, and the runs that it is to be composed to."""
        runs = find_runs(self.tree.layers, self._roles.of(plan, index))
        key = self._roles.question(plan, index, runs)
        complete = all(len(run.cycles) >= KEPT_CYCLES for run in runs)
        if key not in self._rehearsed and not complete:
            runs = [run for run in runs if len(run.cycles) > KEPT_CYCLES]  # the short ones are rehearsed as they are
            key = self._roles.question(plan, index, runs)
        return key, runs

    def _by_itself(self, plan: Plan, index: int, runs: Sequence[Run]) -> _Sized:
        return Rehearsed.of(self._record(plan, index, runs), self.tree.layers, runs), None

    def _record(self, plan: Plan, index: int, runs: Sequence[Run]) -> Recording:
        from badam_planner.rehearsal.rehearse import rehearse

        return rehearse(plan, index, layers=self.tree.layers, **self._left_out(runs))

    def _left_out(self, runs: Sequence[Run]) -> dict[str, Any]:
        """What a rehearsal is to be told of the layers that it may leave out."""
        without = dict(chain.from_iterable(run.left_out.items() for run in runs))
        return {"classes": self.tree.layer_classes, "without": without}

    def expect_sizes(self, batch_sizes: Sequence[int], lengths: Sequence[int]) -> None:
        """Say which sizes are going to be asked about, so that few of them need a rehearsal of their own.

        What follows from the ends of a range (badam_planner.composition.sizes) equals the rehearsal in bytes and
        operations. It has no traffic: efforts at such sizes are asked of another evaluator.
        """
        self._families.clear()
        self._ranges = ranges_of(batch_sizes, lengths)

    def _from_family(self, plan: Plan, index: int, runs: Sequence[Run]) -> _Sized | None:
        """What follows for the plan's size from those of its range; None if it does not.

        A family knows no shapes, by which engines cut what is on several GPUs.
        """
        if engine_of(plan.target).joins_gpus:
            return None
        size = (plan.training.batch_size, plan.training.seq_len)
        sizes = next((each for each in self._ranges if each.has(size)), None)
        if sizes is None:
            return None
        key = (sizes, self._roles.question(_at_size(plan, (1, 1)), index, runs))
        try:
            if key not in self._families:
                self._families[key] = None
                family = self._family(plan, index, runs, sizes)
                self._families[key] = (family, Rehearsed.of(family.pattern, self.tree.layers, runs))
            known = self._families[key]
            return None if known is None else (known[1], known[0].numbers_at(size))
        except NoFamily:
            return None

    def _family(self, plan: Plan, index: int, runs: Sequence[Run], sizes: SizeRange) -> SizeFamily:
        probes = sizes.probes()
        tasks = [partial(self._record, _at_size(plan, size), index, runs) for size in probes]
        return SizeFamily(sizes, dict(zip(probes, run_all(tasks, self.workers), strict=True)))


def _worth_simulating(peaks: Mapping[int, BlockPeaks]) -> list[int]:
    """The blocks whose tensors come near the highest peak, so that the allocator's share may decide between them.

    Near is a tenth of what a step adds to what is there before it: only that can be fragmented.
    """
    highest = max(peaks.values(), key=lambda block: block.peak_allocated_bytes)
    resident = highest.by_phase.get(Phase.SETUP, 0)
    bar = highest.peak_allocated_bytes - 0.1 * (highest.peak_allocated_bytes - resident)
    return [index for index, block in peaks.items() if block.peak_allocated_bytes >= bar]


def _at_size(plan: Plan, size: Size) -> Plan:
    training = plan.training.model_copy(update={"batch_size": size[0], "seq_len": size[1]})
    return plan.model_copy(update={"training": training})

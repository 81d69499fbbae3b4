"""From the rehearsal of a step on one GPU to that of one of N GPUs, sharded or with whole copies. Pure, no torch.

The activations of a GPU's own micro-batch are those of the rehearsal. What changes is where the states lie and what
has to be fetched: under FSDP2 each GPU keeps one N-th of every parameter, master, moment and gradient, and around
each layer's passage come buffers of the gathered layer. With several copies of the model, each cut over N GPUs (HSDP),
the copies average what each GPU has of the gradients. :func:`shard` puts these into the recording where FSDP2 makes
them, so that peaks, categories and the allocator's rounding follow as for one GPU. docs/many-gpus.md has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from badam.blocks.names import ParameterInfo, belongs, enclosing
from badam.plan import Plan
from badam.vocabulary import ELEMENT_BYTES, Category, Dtype, Phase
from badam_planner.multi_gpu.gloo import gloos_copies
from badam_planner.multi_gpu.per_rank import (
    buffer,
    cut,
    on_one_gpu,
    spread_out,
)
from badam_planner.multi_gpu.slots import SPREAD, ReductionSlot, Slot
from badam_planner.recording.recording import NEVER, Allocation, Recording, TensorRole

ROOT = ""
"""The unit of all parameters that are in no layer: gathered from the start of forward to the end of backward."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Parameters that are gathered together."""

    path: str  # of the module; ROOT for what is left
    parameters: tuple[ParameterInfo, ...]

    def shard_numel(self, shards: int) -> int:
        """Entries that one GPU keeps, with the padding of tensors whose rows do not divide."""
        return sum(shard_numel(info, shards) for info in self.parameters)

    def gathered_numel(self, shards: int) -> int:
        """Entries of the unit when it is whole, with padding."""
        return shards * self.shard_numel(shards)


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a model is cut over GPUs.

    Args:
        units: in order of execution, the root last.
        shards: N, the GPUs that one copy is cut over.
        dtype: of the parameters, in which they are gathered.
        trained: names of the active block's parameters.
        head_module: path of the output projection, which may share the embedding's matrix; "" if there is none.
        replicas: copies of the model; their gradients are averaged.
        over_gloo: the GPUs are processes on the CPU, and gloo carries their messages.
    """

    units: tuple[Unit, ...]
    shards: int
    dtype: Dtype
    trained: frozenset[str]
    head_module: str = ""
    replicas: int = 1
    over_gloo: bool = False

    @property
    def shapes(self) -> dict[str, ParameterInfo]:
        """The model's parameters by name."""
        return {info.name: info for unit in self.units for info in unit.parameters}

    def unit_of(self, name: str) -> Unit:
        """The unit that a parameter or module belongs to."""
        for unit in self.units:
            if unit.path != ROOT and belongs(name, (unit.path,)):
                return unit
        return self.units[-1]

    @property
    def element_bytes(self) -> int:
        """Bytes of one gathered entry."""
        return ELEMENT_BYTES[self.dtype]


def sharding_of(
    plan: Plan,
    *,
    parameters: Sequence[ParameterInfo],
    layers: Sequence[str],
    head_module: str,
    trained: frozenset[str],
) -> Sharding:
    """How the plan's engine cuts the model while the parameters ``trained`` are active."""
    target, units = plan.target, units_of(parameters, layers=layers, head_module=head_module)
    on_cpu = target.gpu == "cpu"
    return Sharding(
        units,
        target.shards,
        plan.training.dtype,
        trained,
        head_module=head_module,
        replicas=target.replicas,
        over_gloo=on_cpu,
    )


def shard_numel(info: ParameterInfo, shards: int) -> int:
    """Entries of one GPU's part of a parameter: its rows are distributed, the last GPU's are padded."""
    rows, *rest = info.shape or (1,)
    return math.ceil(rows / shards) * math.prod(rest)


def units_of(parameters: Sequence[ParameterInfo], *, layers: Sequence[str], head_module: str) -> tuple[Unit, ...]:
    """The units that badam.distributed.fsdp2 makes: an embedding of its own, every layer, the root with the rest.

    An embedding that the head shares belongs to the root.
    """
    names = [info.name for info in parameters]
    first_layered = next((index for index, name in enumerate(names) if belongs(name, layers)), len(names))
    tied = not head_module or f"{head_module}.weight" not in names
    embedding = [] if tied else [info for info in parameters[:first_layered] if info.is_matrix][:1]
    own = [info.name for info in embedding]
    units = [Unit(info.name.rpartition(".")[0], (info,)) for info in embedding]
    units += [Unit(path, tuple(info for info in parameters if belongs(info.name, (path,)))) for path in layers]
    rest = tuple(info for info in parameters if not belongs(info.name, layers) and info.name not in own)
    return (*units, Unit(ROOT, rest))


def shard(recording: Recording, sharding: Sharding) -> Recording:
    """The recording of one of ``sharding.shards`` GPUs under FSDP2.

    Formula: parameters, masters, moments, gradients and temporaries of step and switch hold ceil(rows / N) rows.
    Around a unit's forward and backward are its gather buffer and its whole parameters, 2 bytes an entry each for
    bf16; the next unit's buffer joins them, because gathers run ahead. After the active unit's backward its whole
    gradient in the model's type meets the fp32 buffer of the reduction and its 1/N, which several copies of the model
    add up over the micro-batches and average in the last one, in a buffer that stays to the end of backward.
    On the CPU gloo copies each message, see :func:`badam_planner.multi_gpu.gloo.gloos_copies`.
    Not counted: buffers of the NCCL on a GPU (see docs/many-gpus.md), event and stream objects.
    """
    shapes = sharding.shapes
    spread = spread_out(recording)
    passes = Passes(spread, sharding)

    def rows(allocation: Allocation, info: ParameterInfo) -> Allocation:
        count, *rest = info.shape or (1,)
        return cut(allocation, info, (math.ceil(count / sharding.shards), *rest))

    gradients, allocations = on_one_gpu(spread, shapes, sharding.shards, rows)
    allocations += [buffer for buffer in passes.buffers() if buffer.nbytes]
    if gradients:
        allocations += _reduced(gradients, allocations, passes, sharding, shapes)
    if sharding.over_gloo:
        allocations += list(gloos_copies(allocations))
    allocations.sort(key=lambda allocation: allocation.born)
    return replace(spread, allocations=allocations)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One micro-batch: ticks at which units begin, in order."""

    forward: dict[Unit, int]
    backward: dict[Unit, int]
    begins: int
    ends: int  # of backward
    turns: int  # backward begins


class Passes:
    """The micro-batches of a recording, with the gathers that FSDP2 makes in them."""

    def __init__(self, recording: Recording, sharding: Sharding) -> None:
        self.recording = recording
        self.sharding = sharding
        self.micro_batches = list(self._read())
        self._last_born = self._find_last_born()

    def _read(self) -> Iterator[MicroBatch]:
        starts = [*self.recording.phase_starts, (self.recording.end, Phase.SETUP)]
        begins = [tick for tick, phase in starts if phase is Phase.FORWARD]
        for index, begin in enumerate(begins):
            following = begins[index + 1] if index + 1 < len(begins) else self.recording.end
            inside = [(tick, phase) for tick, phase in starts if begin <= tick < following]
            turns = next(tick for tick, phase in inside if phase is Phase.BACKWARD)
            ends = next((tick for tick, phase in inside if phase in (Phase.STEP, Phase.SETUP)), following)
            marks = [mark for mark in self.recording.layer_marks if begin <= mark.tick < ends]
            forward, backward = (
                {self.sharding.unit_of(mark.layer): mark.tick for mark in marks if mark.kind == kind}
                for kind in ("forward", "backward")
            )
            early = [unit for unit in self.sharding.units[:-1] if unit not in forward]  # the embedding has no mark
            # The root is gathered first, and nothing of a gather reaches back into the phase before.
            first = {
                unit: begin + Slot.UNMARKED_BEGINS + index * Slot.UNMARKED_FOLLOWS for index, unit in enumerate(early)
            }
            yield MicroBatch(
                {self.sharding.units[-1]: begin + Slot.ROOT_BEGINS, **first, **forward}, backward, begin, ends, turns
            )

    def reduced_at(self, micro_batch: MicroBatch, unit: Unit) -> int:
        """When a unit's gradients are reduced: when backward enters the next unit, or at its end.

        The last unit of backward has no input that a gradient flows to, so FSDP2 comes to it in the end.
        """
        own = micro_batch.backward.get(unit, micro_batch.ends)
        later = [tick for tick in micro_batch.backward.values() if tick > own]
        return min(later, default=micro_batch.ends) + Slot.REDUCED

    def buffers(self) -> Iterator[Allocation]:
        """Gather buffers and whole parameters of every unit in every micro-batch."""
        for micro_batch in self.micro_batches:
            yield from self._forward(micro_batch)
            yield from self._backward(micro_batch)

    def _forward(self, micro_batch: MicroBatch) -> Iterator[Allocation]:
        ticks = [*micro_batch.forward.values(), micro_batch.turns]
        for (unit, tick), after in zip(micro_batch.forward.items(), ticks[1:], strict=True):
            # The buffer goes when the next unit is whole, the whole parameters when this unit is through.
            yield self._gathering(unit, tick + Slot.GATHERED_INTO, after + Slot.BUFFER_RELEASED, Phase.FORWARD)
            until = min(after + Slot.RELEASED, self._left(micro_batch, unit))
            if unit.path == ROOT:
                until = micro_batch.ends + Slot.ROOT_RELEASED
            yield self._whole(unit, tick + Slot.WHOLE, until, Phase.FORWARD)

    def _left(self, micro_batch: MicroBatch, unit: Unit) -> int:
        """When forward has left a unit: after the last tensor that was made in it."""
        return self._last_born.get((micro_batch.begins, unit.path), micro_batch.turns) + Slot.MODULE_LEFT

    def _find_last_born(self) -> dict[tuple[int, str], int]:
        """By micro-batch and unit, when its last tensor was made."""
        units = {unit.path for unit in self.sharding.units}
        found: dict[tuple[int, str], int] = {}
        for micro_batch in self.micro_batches:
            for allocation in self.recording.allocations:
                if allocation.phase is Phase.FORWARD and micro_batch.begins <= allocation.born < micro_batch.turns:
                    found[micro_batch.begins, enclosing(allocation.module, units)] = allocation.born
        return found

    def _backward(self, micro_batch: MicroBatch) -> Iterator[Allocation]:
        prefetched = micro_batch.turns + Slot.FIRST  # the root's backward begins first, and asks for the last unit
        for unit, tick in micro_batch.backward.items():
            yield self._gathering(unit, prefetched, tick + Slot.BUFFER_RELEASED_IN_BACKWARD, Phase.BACKWARD)
            yield self._whole(unit, tick + Slot.WHOLE_IN_BACKWARD, self.reduced_at(micro_batch, unit), Phase.BACKWARD)
            prefetched = tick + Slot.NEXT_ASKED_FOR

    def _gathering(self, unit: Unit, born: int, died: int, phase: Phase) -> Allocation:
        return _buffer(TensorRole.GATHER_BUFFER, self._bytes(unit), born=born, died=died, phase=phase, unit=unit)

    def _whole(self, unit: Unit, born: int, died: int, phase: Phase) -> Allocation:
        return _buffer(TensorRole.GATHERED, self._bytes(unit), born=born, died=died, phase=phase, unit=unit)

    def _bytes(self, unit: Unit) -> int:
        return unit.gathered_numel(self.sharding.shards) * self.sharding.element_bytes


def _reduced(
    gradients: Sequence[Allocation],
    allocations: list[Allocation],
    passes: Passes,
    sharding: Sharding,
    shapes: dict[str, ParameterInfo],
) -> list[Allocation]:
    """Whole gradients until the reduction, its buffers, and the fp32 part that stays; changes ``allocations``.

    Autograd's own gradient, which one GPU adds into an fp32 one at once, lives until its unit is reduced.
    """
    added: list[Allocation] = []
    by_unit: dict[Unit, list[Allocation]] = {}
    for gradient in gradients:
        by_unit.setdefault(sharding.unit_of(gradient.parameter), []).append(gradient)
    for number, micro_batch in enumerate(passes.micro_batches):
        for unit, members in by_unit.items():
            at = passes.reduced_at(micro_batch, unit)
            first = passes.micro_batches[0]
            shift = micro_batch.backward.get(unit, micro_batch.turns) - first.backward.get(unit, first.turns)
            for member in members:
                twin = twin_of(member, allocations, sharding) if number == 0 else None
                if twin is not None:
                    allocations.remove(twin)
                nbytes = math.prod(member.shape) * sharding.element_bytes
                born = (twin or member).born + shift
                added.append(
                    replace(
                        member,
                        nbytes=nbytes,
                        born=born,
                        died=at + ReductionSlot.GRADIENTS_RELEASED,
                        dtype=sharding.dtype,
                    )
                )
            numel = sum(shard_numel(shapes[member.parameter], sharding.shards) for member in members)
            whole = 4 * sharding.shards * numel
            begins, ends = at + ReductionSlot.INPUT, micro_batch.ends + Slot.LAST
            added.append(_buffer(TensorRole.REDUCTION_INPUT, whole, born=begins, died=ends, unit=unit))
            kept = max((member.died for member in members), key=lambda tick: math.inf if tick == NEVER else tick)
            parts = _averaged if sharding.replicas > 1 else _summed
            added += parts(Reduction(unit, numel, number, kept), passes, at, sharding.element_bytes)
    return added


@dataclass(frozen=True, slots=True)
class Reduction:
    """The gradients of one unit in one micro-batch, which the GPUs of one copy add up."""

    unit: Unit
    numel: int  # of this GPU's part
    number: int  # of the micro-batch
    kept: int  # when the fp32 gradient of the step goes

    def fp32(self, role: TensorRole, born: int, died: int) -> Allocation:
        """A part in fp32."""
        return _buffer(role, 4 * self.numel, born=born, died=died, unit=self.unit)

    def half(self, at: int, element_bytes: int) -> list[Allocation]:
        """A part in the model's type, in passing, if that is not fp32, of a reduction that begins ``at`` this tick."""
        if element_bytes == 4:
            return []
        born, died, nbytes = at + ReductionSlot.HALF, at + ReductionSlot.DONE, element_bytes * self.numel
        return [_buffer(TensorRole.REDUCED_HALF, nbytes, born=born, died=died, unit=self.unit)]

    def gradient(self, born: int) -> Allocation:
        """What the optimizer steps with."""
        return replace(self.fp32(TensorRole.GRADIENT, born, self.kept), category=Category.GRADIENT)


def _summed(reduction: Reduction, passes: Passes, at: int, element_bytes: int) -> list[Allocation]:
    """This GPU's part of a sum over the GPUs of the only copy, which the optimizer takes at once."""
    parts, born = reduction.half(at, element_bytes), at + ReductionSlot.PART
    if reduction.number == 0:
        return [*parts, reduction.gradient(born)]
    added = reduction.fp32(TensorRole.GRADIENT_OF_MICRO_BATCH, born, at + ReductionSlot.DONE)
    return [*parts, added] if parts else []


def _averaged(reduction: Reduction, passes: Passes, at: int, element_bytes: int) -> list[Allocation]:
    """This GPU's part of a sum over one copy, which waits for the last micro-batch and goes through all copies.

    FSDP2 holds what it averages until the end of backward, beside the gradient in the model's type that it makes of it
    and the fp32 one that the optimizer keeps.
    """
    last, born = passes.micro_batches[-1], at + ReductionSlot.PART
    if reduction.number < len(passes.micro_batches) - 1:
        until = at + ReductionSlot.DONE
        if reduction.number == 0:  # the others are added to it
            until = passes.reduced_at(last, reduction.unit) + ReductionSlot.SUM_RELEASED
        return [reduction.fp32(TensorRole.GRADIENT_SUM, born, until)]
    half = reduction.half(at, element_bytes)
    held = [reduction.fp32(TensorRole.AVERAGED, born, last.ends + Slot.LAST)] if half else []
    return [*held, *half, reduction.gradient(at + ReductionSlot.FP32_OF_HALF if half else born)]


def _buffer(
    role: TensorRole, nbytes: int, *, born: int, died: int, unit: Unit, phase: Phase = Phase.BACKWARD
) -> Allocation:
    """What FSDP2 holds of a unit while this runs."""
    return buffer(
        role, nbytes, born=born, died=died, phase=phase, engine="fsdp2", module=unit.path, parameter=unit.path
    )


def twin_of(gradient: Allocation, allocations: Sequence[Allocation], sharding: Sharding) -> Allocation | None:
    """The gradient in the model's type that a wider one was copied from, and which died right after."""
    if gradient.dtype == sharding.dtype:
        return None
    for allocation in allocations:
        close = gradient.born < allocation.died <= gradient.born + 4 * SPREAD
        if close and allocation.dtype == sharding.dtype and math.prod(allocation.shape) == math.prod(gradient.shape):
            return allocation
    return None

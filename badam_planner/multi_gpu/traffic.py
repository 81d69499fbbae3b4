"""What GPUs send each other in a step: within a copy of the model that is cut over them, and between copies. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from badam.blocks.names import ParameterInfo
from badam_planner.multi_gpu.fsdp2 import Passes, Sharding, Unit, shard_numel
from badam_planner.multi_gpu.per_rank import spread_out
from badam_planner.recording.recording import Recording


@dataclass(frozen=True, slots=True)
class Traffic:
    """Collectives of one optimizer step: how often, and bytes of what is whole afterwards (or before, to reduce)."""

    gathers: int
    gathered_bytes: int
    reduces: int
    reduced_bytes: int
    averages: int = 0
    averaged_bytes: int = 0  # all-reduced between copies of the model: each GPU's part of the gradients

    def sent_bytes(self, shards: int, replicas: int = 1) -> int:
        """Bytes that each GPU sends in a step, by the ring algorithm.

        Formula: (N - 1) / N of every tensor that N shards gather or reduce, and what copies of the model send.
        """
        whole = self.gathered_bytes + self.reduced_bytes
        return round(whole * (shards - 1) / shards) + self.sent_between_bytes(replicas)

    def sent_between_bytes(self, replicas: int) -> int:
        """Bytes that each GPU sends in a step to the GPUs with its part of other copies.

        Formula: 2 (R - 1) / R of every tensor that R copies average.
        """
        return round(2 * self.averaged_bytes * (replicas - 1) / replicas)


def traffic_of_copies(sharding: Sharding) -> tuple[Traffic, Traffic]:
    """What GPUs with whole copies send in a step, and what they would if everything were trained.

    Formula: one message of 4 bytes for each entry of the active block, or of the model.
    """
    sizes = {name: info.numel for name, info in sharding.shapes.items()}
    active, whole = sum(size for name, size in sizes.items() if name in sharding.trained), sum(sizes.values())
    return Traffic(0, 0, 0, 0, 1, 4 * active), Traffic(0, 0, 0, 0, 1, 4 * whole)


def traffic(recording: Recording, sharding: Sharding, reduce_bytes: int = 4) -> Traffic:
    """What FSDP2 sends in one step of the recorded visit.

    Formula: each micro-batch gathers every unit in forward and those that backward reaches a second time, the root
    excepted, and reduces the units with a trained parameter, ``reduce_bytes`` an entry. Several copies of the model
    average what each GPU then has of these once per step, as badam-train has them do.
    """
    passes = Passes(spread_out(recording), sharding)
    gathered = [unit for micro_batch in passes.micro_batches for unit in (*micro_batch.forward, *micro_batch.backward)]
    reduced = [_trained_bytes(unit, sharding, reduce_bytes) for unit in sharding.units if _trained(unit, sharding)]
    return Traffic(
        gathers=len(gathered),
        gathered_bytes=sum(unit.gathered_numel(sharding.shards) for unit in gathered) * sharding.element_bytes,
        reduces=len(passes.micro_batches) * len(reduced),
        reduced_bytes=len(passes.micro_batches) * sum(reduced),
        averages=len(reduced) if sharding.replicas > 1 else 0,
        averaged_bytes=sum(reduced) // sharding.shards if sharding.replicas > 1 else 0,
    )


def traffic_of_everything(sharding: Sharding, micro_batches: int, reduce_bytes: int = 4) -> Traffic:
    """What FSDP2 would send if every parameter were trained: all units but the root gathered twice, all reduced."""
    whole = [unit.gathered_numel(sharding.shards) for unit in sharding.units]
    inner = whole[:-1]
    return Traffic(
        gathers=micro_batches * (len(whole) + len(inner)),
        gathered_bytes=micro_batches * (sum(whole) + sum(inner)) * sharding.element_bytes,
        reduces=micro_batches * len(whole),
        reduced_bytes=micro_batches * sum(whole) * reduce_bytes,
        averages=len(whole) if sharding.replicas > 1 else 0,
        averaged_bytes=sum(whole) // sharding.shards * reduce_bytes if sharding.replicas > 1 else 0,
    )


def _trained_bytes(unit: Unit, sharding: Sharding, reduce_bytes: int) -> int:
    """Bytes of the unit's gradients as they are reduced, with padding."""
    numel = sum(shard_numel(info, sharding.shards) for info in _trained(unit, sharding))
    return sharding.shards * numel * reduce_bytes


def _trained(unit: Unit, sharding: Sharding) -> tuple[ParameterInfo, ...]:
    return tuple(info for info in unit.parameters if info.name in sharding.trained)

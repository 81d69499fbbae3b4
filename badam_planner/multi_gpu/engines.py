"""What each engine makes of the step of one GPU: memory of a rank, bytes that ranks send, memory of the host. Pure.

Nothing else asks which engine a plan has: it asks the engine's model, see :func:`engine_of`.
"""

from __future__ import annotations

from badam.plan import Plan, Target
from badam.vocabulary import Engine, Offload
from badam_planner.multi_gpu.ddp import replicate
from badam_planner.multi_gpu.fsdp2 import Sharding, shard
from badam_planner.multi_gpu.traffic import Traffic, traffic, traffic_of_copies, traffic_of_everything
from badam_planner.multi_gpu.zero3 import on_host, partition, zero3_traffic
from badam_planner.recording.recording import Recording


class EngineModel:
    """An engine, as planning knows it; this one is a single process on one GPU.

    Attributes:
        joins_gpus: whether there are several GPUs.
        cuts_model: whether a GPU has a part of the model, so that more GPUs need less memory each.
        cuts_into_groups: whether the GPUs of one copy of the model may be fewer than all.
        offloads: whether states may lie in host memory.
        overlaps: whether messages are sent while a GPU computes, and not when it is through.
        has_own_linear: whether it computes with a linear layer of its own, so that the step of one GPU differs.
    """

    joins_gpus = False
    cuts_model = False
    cuts_into_groups = False
    offloads = False
    overlaps = False
    has_own_linear = False

    def per_rank(self, recording: Recording, plan: Plan, sharding: Sharding) -> Recording:
        """The step of one of the plan's GPUs.

        Args:
            recording: of one GPU that trains alone.
            plan: what to train.
            sharding: how the plan's model is cut while the recorded block is active.
        """
        return recording

    def traffic(self, recording: Recording, plan: Plan, sharding: Sharding) -> tuple[Traffic, Traffic] | None:
        """What a GPU sends in a step, and what it would if everything were trained; None if there is no other.

        Args:
            recording, plan, sharding: as for :meth:`per_rank`.
        """
        return None

    def host_bytes(self, sharding: Sharding, offload: Offload) -> int | None:
        """What a process keeps in host memory of what is offloaded; None if nothing is."""
        return None


class _Ddp(EngineModel):
    """A whole copy of the model on every GPU; the active block's gradients are averaged after backward."""

    joins_gpus = True

    def per_rank(self, recording: Recording, plan: Plan, sharding: Sharding) -> Recording:
        return replicate(recording)

    def traffic(self, recording: Recording, plan: Plan, sharding: Sharding) -> tuple[Traffic, Traffic]:
        return traffic_of_copies(sharding)


class _Fsdp2(EngineModel):
    """One N-th of every parameter on each GPU, gathered layer by layer; see badam_planner.multi_gpu.fsdp2."""

    joins_gpus = cuts_model = cuts_into_groups = overlaps = True

    def per_rank(self, recording: Recording, plan: Plan, sharding: Sharding) -> Recording:
        return shard(recording, sharding)

    def traffic(self, recording: Recording, plan: Plan, sharding: Sharding) -> tuple[Traffic, Traffic]:
        return traffic(recording, sharding), traffic_of_everything(sharding, plan.training.grad_accum)


class _Zero3(EngineModel):
    """One N-th of every parameter on each GPU, gathered matrix by matrix; see badam_planner.multi_gpu.zero3."""

    joins_gpus = cuts_model = offloads = overlaps = has_own_linear = True

    def per_rank(self, recording: Recording, plan: Plan, sharding: Sharding) -> Recording:
        return partition(recording, sharding, plan.target.offload, shares_memory=plan.target.gpu == "cpu")

    def traffic(self, recording: Recording, plan: Plan, sharding: Sharding) -> tuple[Traffic, Traffic]:
        return zero3_traffic(recording, sharding, plan.training.grad_accum)

    def host_bytes(self, sharding: Sharding, offload: Offload) -> int | None:
        return None if offload == "none" else sum(held.nbytes for held in on_host(sharding, offload))


ENGINES: dict[Engine, EngineModel] = {"single": EngineModel(), "ddp": _Ddp(), "fsdp2": _Fsdp2(), "zero3": _Zero3()}


def engine_of(target: Target) -> EngineModel:
    """The model of the engine that joins the target's GPUs."""
    return ENGINES[target.engine]

"""Ask the rehearsal what each of several cards needs: that of one card, with what the engine adds and takes away."""

from __future__ import annotations

from collections.abc import Callable

from badam.blocks.names import belongs
from badam.plan import Plan
from badam_planner.composition.peaks import BlockPeaks, DepthPeaks
from badam_planner.multi_gpu.fsdp2 import Sharding, per_gpu, sharding_of
from badam_planner.multi_gpu.traffic import Traffic, traffic_per_step
from badam_planner.multi_gpu.zero3 import on_host, partition, zero3_traffic
from badam_planner.recording.forecast import Forecast, forecast
from badam_planner.recording.recording import Recording
from badam_planner.rehearsal.evaluator import Evaluator
from badam_planner.rehearsal.roles import trained_prefixes

MOST_GPUS = 4096
"""More cards than this are not tried: a model that does not fit then does not fit for its activations."""


class GpusEvaluator(Evaluator):
    """An evaluator that knows the plan's engine; for one card the same as its base."""

    def recording(self, plan: Plan, index: int) -> Recording:
        """The rehearsal of one block on one of the plan's cards, at full depth."""
        whole = super().recording(plan, index)
        if plan.target.engine == "zero3":
            return partition(
                whole,
                self._sharding(plan, index),
                self.tree.head_module,
                plan.target.offload,
                shares_memory=plan.target.gpu == "cpu",
            )
        return whole if plan.target.engine == "single" else per_gpu(whole, plan, self._sharding(plan, index))

    def peaks(self, plan: Plan, index: int) -> BlockPeaks:
        """The highest allocated bytes of one of the plan's cards with one block active."""
        if plan.target.engine == "single":
            return super().peaks(plan, index)
        return DepthPeaks(self.recording(plan, index), (), plan.target).peaks(())

    def _forecast(self, plan: Plan, index: int) -> Forecast:
        if plan.target.engine == "single":
            return super()._forecast(plan, index)
        return forecast(self.recording(plan, index), plan.target, head_module=self.tree.head_module)

    def traffic(self, plan: Plan, index: int) -> tuple[Traffic, Traffic] | None:
        """What the cards send in a step with one block active, and what they would if all were; None for one card."""
        recording, sharding = super().recording(plan, index), self._sharding(plan, index)
        if plan.target.engine == "zero3":
            return zero3_traffic(recording, sharding, self.tree.head_module, plan.training.grad_accum)
        return traffic_per_step(recording, plan, sharding)

    def host_bytes(self, plan: Plan) -> int | None:
        """What each process keeps in host memory, at most over the blocks; None if nothing is offloaded."""
        if plan.target.offload == "none":
            return None
        shardings = (self._sharding(plan, index) for index in range(len(plan.partition.blocks)))
        return max(sum(held.nbytes for held in on_host(sharding, plan.target.offload)) for sharding in shardings)

    def _sharding(self, plan: Plan, index: int) -> Sharding:
        prefixes = trained_prefixes(plan, plan.partition.blocks[index])
        trained = frozenset(info.name for info in self.tree.parameters if belongs(info.name, prefixes))
        return sharding_of(plan, self.tree.parameters, self.tree.layers, self.tree.head_module, trained)


def with_traffic(plan: Plan, evaluator: GpusEvaluator) -> Plan:
    """``plan`` with what each card sends, for the block that sends most, the lowest one, and has in host memory."""
    if plan.prediction is None or plan.target.engine == "single":
        return plan
    pairs = (evaluator.traffic(plan, index) for index in {0, len(plan.partition.blocks) - 1})
    shards, replicas = plan.target.shards, plan.target.replicas
    own, full = max(filter(None, pairs), key=lambda pair: pair[0].sent_bytes(shards, replicas))
    sent = {
        "sent_bytes": own.sent_bytes(shards, replicas),
        "sent_bytes_of_full": full.sent_bytes(shards, replicas),
        "sent_between_bytes": own.sent_between_bytes(replicas),
        "sent_between_bytes_of_full": full.sent_between_bytes(replicas),
        "host_bytes": evaluator.host_bytes(plan),
    }
    return plan.model_copy(update={"prediction": plan.prediction.model_copy(update=sent)})


def smallest_number(fits: Callable[[int], bool]) -> int | None:
    """The smallest number of cards for which ``fits`` is true, taking it to stay true for more; None up to the most."""
    most = 1
    while not fits(most):
        most *= 2
        if most > MOST_GPUS:
            return None
    least = most // 2  # does not fit, or 0
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if fits(middle) else (middle, most)
    return most


def shard_sizes(cards: int, gpus_per_node: int) -> list[int]:
    """Into groups of how many ``cards`` can be divided, the smallest first, so that groups do not straddle machines.

    Groups of one are left out: they hold whole copies.
    """
    several_nodes = cards > gpus_per_node
    return [
        size
        for size in range(2, cards + 1)
        if cards % size == 0
        and (size == cards or not several_nodes or gpus_per_node % size == 0 or size % gpus_per_node == 0)
    ]

"""What is shown of a candidate, and the prediction that a plan carries."""

from __future__ import annotations

from collections.abc import Mapping

from badam.plan import PhaseWork, Plan, Prediction
from badam.training.methods import method_of
from badam.vocabulary import Phase
from badam_planner.composition.step_time import Work, mean_work, step_seconds
from badam_planner.multi_gpu.engines import engine_of
from badam_planner.rehearsal.evaluator import Evaluator, PlanForecast
from badam_planner.search.request import Request
from badam_planner.search.result import Candidate
from badam_planner.search.trial import headroom


def formula_bytes(plan: Plan, forecast: PlanForecast) -> int:
    """Closed form of the model states that each card keeps, with the entries that ``forecast`` counts.

    What is offloaded is on no card: of 2M + 16M/D the optimizer leaves 2M, and all of it leaves nothing.
    """
    if plan.target.offload == "all":
        return 0
    if plan.target.offload == "optimizer":
        return -(-2 * plan.model.parameters // plan.target.num_gpus)
    whole = method_of(plan.method).state_bytes(
        plan.model.parameters,
        forecast.trained_entries,
        len(plan.partition.blocks),
        quantized=forecast.quantized_entries,
    )
    return -(-whole // plan.target.shards)


def candidate_of(request: Request, plan: Plan, forecast: PlanForecast, *, recommended: bool) -> Candidate:
    """A tried plan as a row of the table."""
    worst, blocks = forecast.worst, plan.partition.blocks
    return Candidate(
        method=plan.method,
        strategy=plan.partition.strategy,
        num_blocks=len(blocks),
        largest_block_parameters=forecast.trained_entries,
        checkpointing=plan.training.checkpointing,
        loss=plan.training.loss,
        formula_bytes=formula_bytes(plan, forecast),
        peak_allocated_bytes=worst.peak_allocated_bytes,
        peak_reserved_bytes=worst.peak_reserved_bytes,
        peak_device_bytes=worst.peak_device_bytes,
        peak_phase=worst.peak_phase,
        peak_module=worst.peak_module,
        peak_block=blocks[forecast.worst_block].name,
        headroom_bytes=headroom(request, forecast),
        backward_relative=sum(forecast.backward_relative) / len(forecast.backward_relative),
        by_category=worst.by_category,
        by_phase=worst.by_phase,
        fits=headroom(request, forecast) >= 0,
        recommended=recommended,
        largest=worst.largest,
        expandable_segments=plan.target.expandable_segments,
    )


def with_prediction(plan: Plan, forecast: PlanForecast, samples: int | None = None) -> Plan:
    """The plan with what is predicted for each block and for the worst one.

    Args:
        plan: without a prediction.
        forecast: of every block.
        samples: sequences of an epoch, if known.
    """
    worst = forecast.worst
    means = mean_work(forecast.work_by_phase)
    knows_rates = plan.target.rates is not None
    blocks = plan.partition.blocks
    if forecast.blocks:  # a method that trains several blocks at a time has no peak of one of them
        blocks = tuple(
            block.model_copy(
                update={
                    "peak_allocated_bytes": own.peak_allocated_bytes,
                    "peak_phase": own.peak_phase,
                    "peak_by_phase": own.by_phase,
                    "backward_relative": relative,
                    "seconds_by_phase": _seconds(work_by_phase) if knows_rates else {},
                }
            )
            for block, own, relative, work_by_phase in zip(
                blocks, forecast.blocks, forecast.backward_relative, forecast.work_by_phase, strict=True
            )
        )
    seconds = step_seconds(_seconds(means), plan.schedule.switch_every) if knows_rates else None
    sequences = plan.training.batch_size * plan.training.grad_accum
    prediction = Prediction(
        peak_allocated_bytes=worst.peak_allocated_bytes,
        peak_reserved_bytes=worst.peak_reserved_bytes,
        peak_device_bytes=worst.peak_device_bytes,
        formula_bytes=formula_bytes(plan, forecast),
        by_category=worst.by_category,
        by_phase=worst.by_phase,
        peak_phase=worst.peak_phase,
        peak_module=worst.peak_module,
        peak_block=blocks[forecast.worst_block].name,
        work_by_phase={
            phase: PhaseWork(
                flops=round(work.flops),
                product_bytes=round(work.product_bytes),
                other_bytes=round(work.other_bytes),
                operators=round(work.operators),
            )
            for phase, work in means.items()
        },
        seconds_by_phase=_seconds(means) if knows_rates else {},
        step_seconds=seconds,
        epoch_seconds=None if seconds is None or not samples else seconds * -(-samples // sequences),
    )
    partition = plan.partition.model_copy(update={"blocks": blocks})
    return plan.model_copy(update={"partition": partition, "prediction": prediction})


def with_traffic(plan: Plan, evaluator: Evaluator) -> Plan:
    """``plan`` with what each GPU sends, for the block that sends most, the lowest one, and has in host memory."""
    if plan.prediction is None or not engine_of(plan.target).joins_gpus:
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


def with_releases(plan: Plan, releases_per_step: float) -> Plan:
    """A plan that does not fit, with how often per step torch gives back its cache to run it."""
    assert plan.prediction is not None
    told = plan.prediction.model_copy(update={"cache_releases_per_step": releases_per_step})
    return plan.model_copy(update={"prediction": told})


def _seconds(work_by_phase: Mapping[Phase, Work]) -> dict[Phase, float]:
    return {phase: work.seconds for phase, work in work_by_phase.items()}

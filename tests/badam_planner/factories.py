"""Plans, measured runs and candidates built by hand, with round numbers that a test can check in its head."""

from __future__ import annotations

from typing import Any

from badam.plan import (
    BlockPlan,
    ModelSpec,
    Partition,
    Plan,
    Prediction,
    Provenance,
    Target,
    Training,
    config_digest,
    record_digest,
)
from badam.profiling.record import BlockMeasurement, Machine, MeasuredRun, Measurement
from badam.units import GIB, MIB
from badam.vocabulary import Category, Phase
from badam_planner.search.result import Candidate, SearchResult

PROVENANCE = Provenance(
    versions={"badam": "2.0.0", "torch": "2.13.0"}, command="badam-plan tiny --gpu rtx3090", date="2026-01-02T03:04:05Z"
)
BY_CATEGORY = {
    Category.PARAMETER: 10 * GIB,
    Category.MASTER: 1 * GIB,
    Category.GRADIENT: 1 * GIB,
    Category.OPTIMIZER_STATE: 2 * GIB,
    Category.ACTIVATION: 3 * GIB,
    Category.LOGITS: 2 * GIB,
    Category.TEMPORARY: 1 * GIB,
}
MEASURED_BY_CATEGORY = {
    Category.PARAMETER: 10 * GIB,
    Category.MASTER: 1 * GIB,
    Category.GRADIENT: 1 * GIB,
    Category.OPTIMIZER_STATE: 2 * GIB,
    Category.ACTIVATION: 6 * GIB + 256 * MIB,
}
BY_PHASE = {
    Phase.FORWARD: 17 * GIB,
    Phase.LOSS: 19 * GIB,
    Phase.BACKWARD: 20 * GIB,
    Phase.STEP: 14 * GIB,
    Phase.SWITCH: 12 * GIB,
}
SECONDS_BY_PHASE = {Phase.FORWARD: 0.2, Phase.LOSS: 0.05, Phase.BACKWARD: 0.4, Phase.STEP: 0.04, Phase.SWITCH: 0.1}


def model(name: str = "acme/tiny-7b", **config: Any) -> ModelSpec:
    config = {"model_type": "llama", "num_hidden_layers": 3, **config}
    return ModelSpec(
        id=name, source="catalogue", config=config, config_digest=config_digest(config), parameters=6_738_415_616
    )


def block_plans(count: int = 3) -> tuple[BlockPlan, ...]:
    """``count`` layers; the first is the worst, and backward shrinks from 1 towards the last."""
    return tuple(
        BlockPlan(
            name=f"layer {index}",
            prefixes=(f"model.layers.{index}",),
            parameters=200_000_000,
            peak_allocated_bytes=20 * GIB - index * GIB,
            peak_phase=Phase.BACKWARD,
            backward_relative=(count - index) / count,
        )
        for index in range(count)
    )


def plan(
    *, blocks: tuple[BlockPlan, ...] | None = None, prediction: dict[str, Any] | None = None, **changes: Any
) -> Plan:
    """A plan that predicts 20 GiB allocated, 21 reserved and 22 on the device, on a card with 23 usable."""
    predicted = {
        "peak_allocated_bytes": 20 * GIB,
        "peak_reserved_bytes": 21 * GIB,
        "peak_device_bytes": 22 * GIB,
        "formula_bytes": 15 * GIB,
        "by_category": BY_CATEGORY,
        "by_phase": BY_PHASE,
        "peak_phase": Phase.BACKWARD,
        "peak_module": "model.layers.0.mlp.down_proj",
        "peak_block": "layer 0",
        **(prediction or {}),
    }
    fields: dict[str, Any] = {
        "model": model(),
        "target": Target(gpu="rtx3090", total_bytes=24 * GIB, usable_bytes=23 * GIB, context_bytes=GIB),
        "partition": Partition(strategy="layer", blocks=blocks or block_plans()),
        "training": Training(batch_size=2, seq_len=512),
        "prediction": Prediction.model_validate(predicted),
        "provenance": PROVENANCE,
        **changes,
    }
    return Plan(**fields)


def block_measurements(count: int = 3, *, steps: int = 4) -> tuple[BlockMeasurement, ...]:
    return tuple(
        BlockMeasurement(
            name=f"layer {index}",
            steps=steps,
            peak_allocated_bytes=20 * GIB - index * GIB + 256 * MIB,
            peak_phase=Phase.BACKWARD,
            peak_by_phase=BY_PHASE,
            seconds_by_phase={**SECONDS_BY_PHASE, Phase.BACKWARD: 0.6 - 0.2 * index},
        )
        for index in range(count)
    )


def measured_run(of: Plan | None = None, *, measurement: dict[str, Any] | None = None, **changes: Any) -> MeasuredRun:
    """A run of ``of`` that measured 20.25 GiB allocated: the prediction was 0.25 GiB, 1.2 %, too low."""
    of = of or plan()
    measured = {
        "memory_source": "torch memory statistics",
        "peak_allocated_bytes": 20 * GIB + 256 * MIB,
        "peak_reserved_bytes": 21 * GIB,
        "peak_device_bytes": 22 * GIB,
        "by_category": MEASURED_BY_CATEGORY,
        "by_phase": {phase: size + 256 * MIB for phase, size in BY_PHASE.items()},
        "peak_phase": Phase.BACKWARD,
        "peak_block": "layer 0",
        "seconds_by_phase": SECONDS_BY_PHASE,
        "step_seconds": 0.7,
        "blocks": block_measurements(),
        "steps": 12,
        "first_loss": 5.5,
        "last_loss": 3.25,
        "tokens_per_second": 1460.0,
        **(measurement or {}),
    }
    fields: dict[str, Any] = {
        "plan_digest": record_digest(of),
        "model": of.model,
        "method": of.method,
        "training": of.training,
        "measurement": Measurement.model_validate(measured),
        "machine": Machine(
            device="cuda",
            device_name="NVIDIA GeForce RTX 3090",
            device_total_bytes=24 * GIB,
            cpu_count=2,
            platform="Linux",
        ),
        "provenance": PROVENANCE,
        **changes,
    }
    return MeasuredRun(**fields)


def candidate(**changes: Any) -> Candidate:
    """A candidate of 32 layers that fits with 1 GiB to spare."""
    fields: dict[str, Any] = {
        "strategy": "layer",
        "num_blocks": 32,
        "largest_block_parameters": 202_383_360,
        "checkpointing": "all",
        "loss": "full",
        "formula_bytes": 15 * GIB,
        "peak_allocated_bytes": 20 * GIB,
        "peak_reserved_bytes": 21 * GIB,
        "peak_device_bytes": 22 * GIB,
        "peak_phase": Phase.BACKWARD,
        "peak_module": "model.layers.0.mlp.down_proj",
        "peak_block": "layer 0",
        "headroom_bytes": 1 * GIB,
        "backward_relative": 0.52,
        "by_category": BY_CATEGORY,
        "by_phase": BY_PHASE,
        "fits": True,
        "recommended": False,
        **changes,
    }
    return Candidate(**fields)


def search_result(*candidates: Candidate) -> SearchResult:
    """Three candidates: one recommended, one that fits, one that does not."""
    return SearchResult(
        model_id="acme/tiny-7b",
        gpu_name="NVIDIA GeForce RTX 3090",
        usable_bytes=23 * GIB,
        batch_size=2,
        seq_len=512,
        candidates=candidates
        or (
            candidate(recommended=True),
            candidate(strategy="attn-mlp", num_blocks=64, largest_block_parameters=135_266_304, backward_relative=0.5),
            candidate(
                strategy="matrix",
                num_blocks=225,
                checkpointing="none",
                loss="chunked",
                peak_allocated_bytes=30 * GIB,
                peak_reserved_bytes=31 * GIB,
                peak_device_bytes=32 * GIB,
                headroom_bytes=-9 * GIB,
                fits=False,
            ),
        ),
    )

"""Comparisons as JSON: every figure of the result object, bytes as integers, nothing rounded."""

from __future__ import annotations

import json
from typing import Any

from badam_planner.accuracy.compare import explain
from badam_planner.accuracy.comparison import Accuracy, Comparison, Pair

SCHEMA_VERSION = 1


def comparison_to_json(comparison: Comparison) -> str:
    """One comparison as a JSON text."""
    return _dump({"schema_version": SCHEMA_VERSION, **comparison_to_dict(comparison)})


def accuracy_to_json(accuracy: Accuracy) -> str:
    """Several comparisons and what they say together, as a JSON text."""
    return _dump(
        {
            "schema_version": SCHEMA_VERSION,
            "accuracy": {
                "runs": len(accuracy.comparisons),
                "median_error_fraction": accuracy.median_error,
                "worst_run": accuracy.comparisons.index(accuracy.worst),
                "worst_because": explain(accuracy.worst),
                "wrong_fits": accuracy.wrong_fits,
                "false_refusals": accuracy.false_refusals,
                "undecided": accuracy.undecided,
            },
            "comparisons": [comparison_to_dict(one) for one in accuracy.comparisons],
        }
    )


def comparison_to_dict(comparison: Comparison) -> dict[str, Any]:
    """One comparison as plain data."""
    plan, run, verdict = comparison.plan, comparison.run, comparison.verdict
    return {
        "model": plan.model.id,
        "method": run.method,
        "partition": plan.partition.strategy,
        "target": plan.target.gpu,
        "device": run.machine.device_name,
        "plan_digest": run.plan_digest,
        "verdict": {
            "passed": verdict.passed,
            "tolerance": verdict.tolerance,
            "worst": verdict.worst_name,
            **_pair(verdict.worst),
        },
        "predicted_fits": comparison.predicted_fits,
        "measured_fits": comparison.measured_fits,
        "totals": [{"name": row.name, **_pair(row.memory)} for row in comparison.totals],
        "categories": [{"name": row.category, **_pair(row.memory)} for row in comparison.categories],
        "phases": [
            {
                "name": row.phase,
                **_pair(row.memory),
                "seconds": row.seconds,
                "predicted_seconds": row.predicted_seconds,
            }
            for row in comparison.phases
        ],
        "blocks": [
            {
                "name": row.name,
                **_pair(row.memory),
                "steps": row.steps,
                "predicted_peak_phase": row.predicted_phase,
                "measured_peak_phase": row.measured_phase,
                "backward_seconds": row.backward_seconds,
                "predicted_backward_seconds": row.predicted_backward_seconds,
            }
            for row in comparison.blocks
        ],
        "step_seconds": {
            "predicted": comparison.prediction.step_seconds,
            "measured": comparison.measurement.step_seconds,
        },
        "notes": list(comparison.notes),
    }


def _pair(pair: Pair) -> dict[str, int | float | None]:
    return {
        "predicted_bytes": pair.predicted,
        "measured_bytes": pair.measured,
        "error_bytes": pair.error_bytes,
        "error_fraction": pair.error_fraction,
    }


def _dump(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False)

"""Predict again, with today's code, what records made earlier have measured. Needs no card.

    python -m benchmarks.gpu.predict benchmarks/records/gpu

What was predicted before the run stays in the record; the new prediction stands beside it.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from badam.errors import BadamError
from badam.plan import Plan, Target, save_record
from badam_planner.rehearsal.model_tree import inspect_model
from badam_planner.sources.catalogue import match_gpu
from benchmarks.gpu.plans import predicted
from benchmarks.gpu.record import CaseRecord, records_under


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if every record could be predicted, 2 if one could not."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0].startswith("-"):
        print(__doc__)
        return 0 if given else 2
    command = shlex.join(["python", "-m", "benchmarks.gpu.predict", *given])
    code = 0
    for path, record in records_under(Path(root) for root in given):
        if record.plan is None or record.plan.prediction is None:
            continue
        try:
            save_record(repredicted(record, record.plan, command), path)
            print(f"{record.case.name}: predicted", flush=True)
        except BadamError as error:
            print(f"{record.case.name}: {error}", file=sys.stderr)
            code = 2
    return code


def repredicted(record: CaseRecord, plan: Plan, command: str) -> CaseRecord:
    """The record with a new prediction for the plan that it ran.

    Raises:
        InputError: if the installed transformers cannot build the model.
    """
    tree = inspect_model(plan.model, plan.training.attention)
    assert plan.prediction is not None
    renewed = predicted(plan.model_copy(update={"target": todays_target(plan.target)}), tree)
    assert renewed.prediction is not None
    formula = {"formula_bytes": plan.prediction.formula_bytes}  # of the whole partition, which the plan does not hold
    provenance = plan.provenance.model_copy(
        update={
            "versions": tree.versions,
            "command": command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    )
    changed = {"prediction": renewed.prediction.model_copy(update=formula), "provenance": provenance}
    return record.model_copy(update={"repredicted": renewed.model_copy(update=changed)})


def todays_target(target: Target) -> Target:
    """The same card, with what the catalogue assumes of it now."""
    known = match_gpu(target.gpu)
    if known is None:
        return target
    assumed = known.target()
    changed = {
        name: getattr(assumed, name)
        for name in ("context_bytes", "workspace_bytes", "multiprocessors", "threads_per_multiprocessor")
    }
    return target.model_copy(update=changed)


if __name__ == "__main__":
    sys.exit(main())

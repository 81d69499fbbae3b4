"""What a plan that was edited by hand may hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from badam.errors import PlanError
from badam.plan import Plan, load_plan, other_versions
from tests.badam_planner import factories

BEYOND: dict[str, Any] = {
    "training.optimizer.betas": [0.9, 1.0],
    "training.optimizer.eps": float("inf"),
    "training.optimizer.learning_rate": float("nan"),
    "training.optimizer.weight_decay": -0.1,
    "training.optimizer.max_grad_norm": float("inf"),
    "training.batch_size": 2**63,
    "training.seq_len": 0,
    "training.options.update_ratio": 1.5,
    "training.options.perturbation": float("nan"),
    "schedule.seed": 2**32,
    "schedule.switch_every": 2**64,
    "model.parameters": 10**30,
    "target.usable_bytes": 2**63,
    "target.num_gpus": 0,
    "prediction.step_seconds": float("inf"),
}


@pytest.mark.parametrize("field", BEYOND)
def test_a_value_beyond_its_limits_is_named_with_its_field(field: str, tmp_path: Path) -> None:
    content = json.loads(factories.plan().model_dump_json())
    *path, name = field.split(".")
    record = content
    for part in path:
        record = record[part]
    record[name] = BEYOND[field]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(PlanError, match=rf"field {field}(\.\d)?: ") as refused:
        load_plan(tmp_path / "plan.json")
    assert "\n" not in str(refused.value)


def made_with(**versions: str) -> Plan:
    plan = factories.plan()
    return plan.model_copy(update={"provenance": plan.provenance.model_copy(update={"versions": versions})})


def test_libraries_of_other_versions_than_the_plans_are_named() -> None:
    from importlib.metadata import version

    assert other_versions(made_with(torch=version("torch"))) is None
    found = other_versions(made_with(torch=version("torch"), transformers="4.0.0", unheard_of="1"))
    assert found == f"transformers 4.0.0, here is {version('transformers')}"

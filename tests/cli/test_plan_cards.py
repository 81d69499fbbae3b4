"""What badam-plan says to numbers of cards that do not go together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from badam.errors import PlanError
from badam.plan import load_plan, record_digest
from badam_cli import plan as command
from tests.badam_planner import factories

REFUSED = {
    "--num-gpus 4": "--num-gpus 4 needs an engine for several cards. Add --engine fsdp2",
    "--num-gpus many": "--num-gpus 'many' is neither a number of cards nor auto.",
    "--num-gpus 0 --engine fsdp2": "--num-gpus '0' is neither",
    "--engine fsdp2": "--engine fsdp2 joins cards, and there is one. Say how many with --num-gpus",
    "--engine ddp --num-gpus auto": "every card needs the same memory, so there is no fewest that fit. Give a number.",
    "--engine fsdp2 --num-gpus 4 --offload all": "--offload all needs DeepSpeed, not fsdp2. Add --engine zero3.",
    "--engine zero3 --num-gpus 4 --shard-size 2": "--shard-size 2 needs FSDP2, not zero3. Add --engine fsdp2.",
    "--shard-size auto": "--shard-size auto needs FSDP2, not single. Add --engine fsdp2.",
    "--engine fsdp2 --num-gpus 4 --shard-size 1": "no copy of the model would be cut. Use --engine ddp.",
    "--engine fsdp2 --num-gpus 4 --shard-size half": "--shard-size 'half' is neither a number of cards nor auto.",
    "--engine fsdp2 --num-gpus auto --shard-size 8": "does not depend on the number of cards. Give --num-gpus a number",
    "--engine fsdp2 --num-gpus 12 --shard-size 8": "divided into groups of 8. Choose --shard-size among 2, 3, 4",
    "--engine fsdp2 --num-gpus 7 --shard-size 2": "divided into groups of 2. Choose --shard-size among 7",
    "--engine fsdp2 --num-gpus 8 --gpus-per-node 0": "Invalid value for '--gpus-per-node'",
}


@pytest.mark.parametrize("options", REFUSED)
def test_numbers_of_cards_that_do_not_go_together_are_refused_in_a_sentence(options: str) -> None:
    result = CliRunner().invoke(command.app, ["badam/none", "--gpu", "cpu", *options.split()])
    assert result.exit_code == 2
    assert REFUSED[options] in " ".join(result.stderr.split())
    assert not result.stdout


def test_a_plan_whose_cards_cannot_be_dealt_out_is_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = json.loads(factories.plan().model_dump_json())
    plan["target"] |= {"engine": "fsdp2", "num_gpus": 16, "shard_size": 3}
    path.write_text(json.dumps(plan))
    with pytest.raises(PlanError) as caught:
        load_plan(path)
    assert caught.value.message == f"The plan {path}, field target: 16 cards cannot be divided into groups of 3."


def test_plans_of_before_there_were_groups_are_read_and_keep_their_digest(tmp_path: Path) -> None:
    path, plan = tmp_path / "plan.json", factories.plan()
    plan = plan.model_copy(update={"target": plan.target.model_copy(update={"engine": "fsdp2", "num_gpus": 4})})
    old = json.loads(plan.model_dump_json())
    for new in ("shard_size", "communication_bytes"):
        del old["target"][new]
    path.write_text(json.dumps(old))
    assert load_plan(path).target.shards == 4
    assert record_digest(load_plan(path)) == record_digest(plan)

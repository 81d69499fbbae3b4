"""The table of cases, the plans made from them, and the optimizers that run them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from badam import BlockOptimizerRatio
from badam.checkpointing import CheckpointedForward
from badam.errors import InputError
from badam.plan import Plan
from badam.profiling import record
from badam.training.build import build_model
from badam.vocabulary import Category, Phase
from badam_planner.sources.catalogue import find_model
from benchmarks.gpu.cases import CASES, Case
from benchmarks.gpu.loop import build_on, optimizer_step, run_steps
from benchmarks.gpu.optimizers import case_optimizer, load_old_badam
from benchmarks.gpu.plans import case_plan, predicted, with_formula
from tests.benchmarks.old_badam import SOURCE
from tests.benchmarks.tiny import CPU, GEMMA2, GPU, LLAMA, case, write_model

DEVICE = torch.device("cpu")


def plan_of(directory: Path, **settings: object) -> tuple[Case, Plan]:
    chosen = case(write_model(directory), **settings)
    return chosen, case_plan(chosen, CPU, "test")[0]


@pytest.fixture
def old_badam(tmp_path: Path) -> Path:
    """A directory that holds something with the surface of badam 1.4."""
    package = tmp_path / "old" / "badam"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from .block_optim import BlockOptimizer\n")
    (package / "block_optim.py").write_text(SOURCE)
    return package.parent


def test_every_case_has_a_name_of_its_own_and_a_catalogued_model() -> None:
    names = [each.name for each in CASES]
    assert len(set(names)) == len(names)
    assert {find_model(each.model).id for each in CASES} == {each.model for each in CASES}
    for old in (each for each in CASES if each.side != "own"):
        assert old.model_copy(update={"side": "own"}) in CASES, "there is nothing to compare it with"


def test_of_each_kind_of_block_the_lowest_the_middle_and_the_highest_are_visited(tmp_path: Path) -> None:
    _, plan = plan_of(tmp_path)
    assert [block.name for block in plan.partition.blocks] == [f"model.layers.{index}" for index in (0, 2, 3)]
    _, plan = plan_of(tmp_path, cut="attn-mlp")
    assert [block.name.removeprefix("model.layers.") for block in plan.partition.blocks] == [
        f"{index}.{part}" for index in (0, 2, 3) for part in ("attention", "mlp")
    ]
    _, plan = plan_of(tmp_path, blocks="all")
    assert len(plan.partition.blocks) == LLAMA["num_hidden_layers"]


def test_layers_of_two_kinds_of_attention_are_two_kinds_of_blocks(tmp_path: Path) -> None:
    plan, _, _ = case_plan(case(write_model(tmp_path, GEMMA2)), CPU, "test")
    assert [int(block.name.rpartition(".")[2]) for block in plan.partition.blocks] == [0, 1, 4, 5, 6, 7]


def test_a_prediction_is_of_the_visited_blocks_and_its_closed_form_of_the_whole_partition(tmp_path: Path) -> None:
    plan, tree, blocks = case_plan(case(write_model(tmp_path)), GPU, "test")
    assert blocks == LLAMA["num_hidden_layers"]
    plan = with_formula(predicted(plan, tree), blocks)
    assert plan.prediction is not None
    assert plan.prediction.formula_bytes == 2 * plan.model.parameters + 16 * plan.model.parameters // blocks
    assert all(block.peak_allocated_bytes for block in plan.partition.blocks)
    assert plan.prediction.peak_device_bytes == plan.prediction.peak_reserved_bytes + GPU.context_bytes


def test_a_list_of_layers_to_checkpoint_is_every_second_one(tmp_path: Path) -> None:
    chosen, plan = plan_of(tmp_path, checkpointing="list", blocks="all")
    model = build_model(plan.model, plan.training)
    optimizer = case_optimizer(chosen, plan, model, None)
    optimizer_step(plan, model, optimizer, DEVICE)
    wrapped = [isinstance(layer.forward, CheckpointedForward) for layer in model.get_submodule("model.layers")]
    assert wrapped == [True, False, True, False]


def test_everything_at_once_is_adam_and_one_block(tmp_path: Path) -> None:
    _, plan = plan_of(tmp_path, method="adam")
    assert (plan.method, len(plan.partition.blocks)) == ("adam", 1)


def test_a_share_of_every_matrix_is_trained_by_the_ratio_optimizer(tmp_path: Path) -> None:
    chosen, plan = plan_of(tmp_path, method="badam-ratio", update_ratio=0.25)
    assert (plan.method, plan.partition.strategy) == ("badam-ratio", "ratio")
    model = build_on(DEVICE, plan)
    optimizer = case_optimizer(chosen, plan, model, None)
    assert isinstance(optimizer, BlockOptimizerRatio)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer_step(plan, model, optimizer, DEVICE)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert "model.layers.0.mlp.up_proj.weight" in changed
    assert "model.embed_tokens.weight" not in changed


def test_a_run_visits_every_block_as_often_as_the_case_says(tmp_path: Path) -> None:
    chosen, plan = plan_of(tmp_path, block_epochs=2)
    model = build_on(DEVICE, plan)
    optimizer = case_optimizer(chosen, plan, model, None)
    run = run_steps(plan, model, optimizer, chosen.steps(len(plan.partition.blocks)), command="the command")
    assert [block.steps for block in run.measurement.blocks] == [4, 4, 4]
    assert run.provenance.command == "the command"


def test_accumulated_micro_batches_are_one_optimizer_step(tmp_path: Path) -> None:
    chosen, plan = plan_of(tmp_path, grad_accum=3)
    model = build_on(DEVICE, plan)
    optimizer = case_optimizer(chosen, plan, model, None)
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    with record(optimizer, model, plan=plan) as run:
        optimizer_step(plan, model, optimizer, DEVICE)
    assert (len(seen), len(run.steps)) == (3, 1)


def test_badam_1_4_goes_through_the_same_blocks_at_the_same_pace(tmp_path: Path, old_badam: Path) -> None:
    chosen, plan = plan_of(tmp_path, side="badam-1.4", block_epochs=2)
    model = build_on(DEVICE, plan)
    optimizer = case_optimizer(chosen, plan, model, old_badam)
    active = []
    for _ in range(6):
        trained = {name.split(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
        active.append((optimizer.current_block_idx, *trained))  # type: ignore[attr-defined]
        optimizer_step(plan, model, optimizer, DEVICE)
    assert active == [(0, "0"), (0, "0"), (1, "2"), (1, "2"), (2, "3"), (2, "3")]


def test_a_run_of_badam_1_4_is_measured_by_block_with_its_switches(
    tmp_path: Path, old_badam: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen, plan = plan_of(tmp_path, side="badam-1.4")
    model = build_on(DEVICE, plan)
    run = run_steps(plan, model, case_optimizer(chosen, plan, model, old_badam), 6, command="test")
    assert [(block.name, block.steps) for block in run.measurement.blocks] == [
        (block.name, 2) for block in plan.partition.blocks
    ]
    assert Phase.SWITCH in run.measurement.seconds_by_phase
    assert run.measurement.by_category[Category.MASTER] > 0
    assert capsys.readouterr().out == ""


def test_a_layer_is_not_taken_for_another_one_whose_number_begins_alike(tmp_path: Path, old_badam: Path) -> None:
    chosen = case(write_model(tmp_path, {**LLAMA, "num_hidden_layers": 12}), side="badam-1.4", blocks="all")
    plan, _, _ = case_plan(chosen, CPU, "test")
    second = plan.partition.model_copy(update={"blocks": plan.partition.blocks[1:2]})
    model = build_on(DEVICE, plan)
    case_optimizer(chosen, plan.model_copy(update={"partition": second}), model, old_badam)
    trained = {name.split(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"1"}


def test_a_directory_without_badam_1_4_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not hold badam"):
        load_old_badam(tmp_path)

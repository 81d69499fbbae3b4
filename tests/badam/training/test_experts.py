"""Mixtures of experts, whose layers have stacks of matrices: adapters, factored moments, the routers' loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM

from badam.errors import InputError
from badam.plan import Plan
from badam.training.build import build_model, prepare_model
from badam.training.methods import method_of
from badam.training.methods._pytorch_optimizer import FusedAdaLomo
from badam.vocabulary import Method
from badam_planner.rehearsal.evaluator import Evaluator
from tests.badam.training.tiny import run_tiny
from tests.badam_planner.rehearsal.measuring import measure
from tests.badam_planner.rehearsal.plans import QWEN3_MOE, plan_of


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def lora_plan() -> Plan:
    return plan_of(QWEN3_MOE, 2, method="lora", seq_len=16, dtype="bfloat16")[0]


def test_merged_adapters_of_experts_compute_what_they_did_beside_them() -> None:
    torch.manual_seed(0)
    plan = lora_plan()
    model = build_model(plan.model, plan.training)
    names = set(model.state_dict())
    prepare_model(model, plan)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert any("experts" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    for parameter in adapters:
        nn.init.normal_(parameter, std=0.05)
    model.eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        beside = model(input_ids=tokens).logits.float()
        method_of("lora").finish(model)
        merged = model(input_ids=tokens).logits.float()
    assert set(model.state_dict()) == names
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    torch.testing.assert_close(merged, beside, atol=0.02, rtol=0.1)  # weights are rounded to bf16


def test_a_run_with_adapters_on_experts_leaves_checkpoints_and_a_model(tmp_path: Path) -> None:
    plan = lora_plan()
    run_tiny(plan, tmp_path, init="random", max_steps=3, save_steps=2)
    run_tiny(plan, tmp_path, init="random", max_steps=4, save_steps=2, resume=True)
    assert (tmp_path / "run/checkpoint-2").is_dir()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert sum(parameter.numel() for parameter in saved.parameters()) == sum(
        parameter.numel() for parameter in build_model(plan.model, plan.training).parameters()
    )


def test_each_matrix_of_a_stack_has_adalomo_moments_of_its_own() -> None:
    torch.manual_seed(0)
    values, gradients = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    gradients[1] *= 100  # of another scale: shared moments would show

    def moments(start: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        model = nn.Module()
        model.weight = nn.Parameter(start.clone())
        optimizer = FusedAdaLomo(model, lr=0.1)
        optimizer.fused_backward((model.weight * gradient).sum(), 0.1)
        return optimizer.exp_avg_sq_row["weight"], optimizer.exp_avg_sq_col["weight"], model.weight.detach()

    rows, columns, _ = moments(values, gradients)
    for index in range(2):
        own_rows, own_columns, _ = moments(values[index], gradients[index])
        torch.testing.assert_close(rows[index], own_rows)
        torch.testing.assert_close(columns[index], own_columns)
    torch.testing.assert_close(moments(values[:1], gradients[:1])[2][0], moments(values[0], gradients[0])[2])


@pytest.mark.parametrize("method", ["adalomo", "lora"])
def test_methods_on_experts_are_predicted_to_the_byte(method: Method) -> None:
    plan, tree = plan_of(QWEN3_MOE, 2, method=method, strategy="full", seq_len=24)
    predicted = Evaluator(tree).worst_block(plan).worst.peak_allocated_bytes
    adapters = sum(info.is_matrix for info in tree.parameters)
    scalars = 8 * adapters if method == "lora" else 0  # host memory for the numbers that scale adapters
    assert 0 <= measure(plan).peak_bytes - predicted <= scalars


def test_a_method_without_turns_refuses_blocks_that_take_them(tmp_path: Path) -> None:
    plan, _ = plan_of(QWEN3_MOE, 2, method="adalomo", strategy="layer", seq_len=16)
    with pytest.raises(InputError, match="the plan has 2 blocks"):
        run_tiny(plan, tmp_path, init="random", max_steps=1)


def test_the_routers_loss_is_not_added_behind_the_plans_back(tmp_path: Path) -> None:
    plan, _ = plan_of(QWEN3_MOE, 2, loss="chunked", seq_len=16)  # which refuses any other loss beside its own
    run_tiny(plan, tmp_path, init="random", max_steps=1)
    assert '"output_router_logits": false' in (tmp_path / "run/model/config.json").read_text(encoding="utf-8")

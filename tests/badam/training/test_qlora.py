"""Adapters beside weights in 4 bits through whole runs: saved alone, resumed to the bit, evaluated without harm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from badam.errors import InputError
from badam.plan import BlockPlan, MethodOptions, Partition, Plan
from badam.training.build import build_model, prepare_model
from badam.training.methods import method_of
from tests.badam.training.tiny import run_tiny, tiny_plan

bitsandbytes = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

EVERYTHING = Partition(strategy="full", blocks=(BlockPlan(name="all", prefixes=("model", "lm_head"), parameters=1),))


def qlora_plan(**changes: Any) -> Plan:
    options = {"training": {"options": MethodOptions(rank=4)}, "optimizer": {"learning_rate": 1e-2}}
    return tiny_plan(method="qlora", partition=EVERYTHING, **{**options, **changes})


def losses(directory: Path) -> list[float]:
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def adapters(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(directory / "model" / "adapter_model.safetensors")
    return found


def test_a_resumed_run_goes_on_as_the_uninterrupted_one_and_adapters_alone_are_saved(tmp_path: Path) -> None:
    plan = qlora_plan()
    run_tiny(plan, tmp_path, output="whole", max_steps=5, save_steps=2, lr_scheduler="constant")
    run_tiny(plan, tmp_path, output="parts", max_steps=2, save_steps=2, lr_scheduler="constant")
    run_tiny(plan, tmp_path, output="parts", max_steps=5, resume=True, lr_scheduler="constant")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    one, other = adapters(tmp_path / "parts"), adapters(tmp_path / "whole")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert one.keys() == other.keys()
    assert all("lora_" in name for name in one)
    assert not list(tmp_path.rglob("model.safetensors"))


def test_a_run_is_not_resumed_beside_other_weights(tmp_path: Path) -> None:
    run_tiny(qlora_plan(), tmp_path, max_steps=2, save_steps=1)
    with pytest.raises(InputError, match="trained beside other weights"):
        run_tiny(qlora_plan(), tmp_path, max_steps=4, resume=True, seed=1)


def test_an_evaluation_does_not_change_the_steps_after_it(tmp_path: Path) -> None:
    """On processors with bf16 instructions bitsandbytes repacks weights when they are used without gradients."""
    data = tmp_path / "held-out.jsonl"
    data.write_text('{"prompt": "say sun ", "completion": "moon star"}\n' * 2, encoding="utf-8")
    run_tiny(qlora_plan(), tmp_path, output="plain", max_steps=4)
    run_tiny(qlora_plan(), tmp_path, output="evaluated", max_steps=4, eval_data=str(data), eval_steps=1)
    assert losses(tmp_path / "plain") == losses(tmp_path / "evaluated")


def test_the_best_adapters_are_those_that_are_saved(tmp_path: Path) -> None:
    result, _ = run_tiny(
        qlora_plan(optimizer={"learning_rate": 1.0}), tmp_path, eval_share=0.2, eval_steps=1, keep_best=True
    )
    assert result.best is not None
    best = load_file(tmp_path / f"run/checkpoint-{result.best.step}/adapter_model.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in adapters(tmp_path / "run").items())


def test_weights_are_quantized_alike_in_loading_and_afterwards(tmp_path: Path) -> None:
    plan, method = qlora_plan(), method_of("qlora")
    torch.manual_seed(3)
    base = str(tmp_path / "base")
    build_model(plan.model, plan.training).save_pretrained(base)
    models = [
        build_model(plan.model, plan.training, weights=base, loading=method.loading_options(plan)),
        build_model(plan.model, plan.training, weights=base),
    ]
    for model in models:
        prepare_model(model, plan)
    here, there = (dict(model.named_parameters()) for model in models)
    packed = [name for name, parameter in here.items() if hasattr(parameter, "quant_state")]
    assert len(packed) == 21  # seven in each of three layers
    assert not any("lm_head" in name for name in packed)
    assert all(torch.equal(here[name], there[name]) for name in packed)
    assert all(
        torch.equal(one, other) for (_, one), (_, other) in zip(*map(method.unnamed_weights, models), strict=True)
    )


def test_saved_adapters_are_those_of_peft_over_the_quantized_base(tmp_path: Path) -> None:
    plan, method = qlora_plan(), method_of("qlora")
    run_tiny(tiny_plan(), tmp_path, output="first", max_steps=1)  # leaves a model with its tokenizer
    base = str(tmp_path / "first/model")
    run_tiny(plan, tmp_path, init=base, max_steps=6, lr_scheduler="constant")
    quantized = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, **method.loading_options(plan))
    quantized.train()  # in evaluation bitsandbytes repacks weights on some processors, and not such small ones
    tokens = torch.arange(3, 15)[None]
    before = quantized(input_ids=tokens).logits
    loaded = peft.PeftModel.from_pretrained(quantized, tmp_path / "run/model").train()
    assert loaded.peft_config["default"].base_model_name_or_path == base
    assert not torch.equal(loaded(input_ids=tokens).logits, before)
    for name, tensor in peft.get_peft_model_state_dict(loaded).items():
        assert torch.equal(tensor, adapters(tmp_path / "run")[name])


def test_a_device_on_which_bitsandbytes_fails_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(bitsandbytes, "matmul_4bit", fail)
    with pytest.raises(InputError, match="cannot train with 4-bit weights on cpu: RuntimeError: no kernel image"):
        run_tiny(qlora_plan(), tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_classification_is_refused() -> None:
    plan = qlora_plan()
    plan = plan.model_copy(update={"model": plan.model.model_copy(update={"task": "sequence-classification"})})
    with pytest.raises(InputError, match="qlora trains language models"):
        method_of("qlora").check(plan)


def test_other_types_than_bfloat16_are_refused() -> None:
    with pytest.raises(InputError, match="qlora computes in bfloat16; the plan is for float32"):
        method_of("qlora").check(qlora_plan(training={"dtype": "float32"}))

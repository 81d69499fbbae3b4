"""What is said of a configuration that a plan does not take as it stands."""

from __future__ import annotations

from typing import Any

import pytest

from badam.training.weights import stored_quantized, unquantized
from badam_planner.sources.model_source import notes_on

FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "FP8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8"),
    "AWQ": ({"quant_method": "awq", "bits": 4, "group_size": 128}, "AWQ, 4 bits"),
    "GPTQ": ({"quant_method": "gptq", "bits": 8}, "GPTQ, 8 bits"),
    "MXFP4": ({"quant_method": "mxfp4"}, "MXFP4"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
    "bitsandbytes of before it was named": ({"load_in_8bit": True, "load_in_4bit": False}, "bitsandbytes, 8 bits"),
    "compressed-tensors": ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "compressed-tensors"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_that_is_stored_quantized_is_said_to_be(form: str) -> None:
    settings, words = FORMS[form]
    assert stored_quantized({"quantization_config": settings}) == words
    (note,) = notes_on("acme/model", {"model_type": "llama", "quantization_config": settings}, "bfloat16")
    assert f"acme/model is stored quantized ({words})" in note
    assert "weights in bfloat16" in note


def test_a_quantized_text_part_is_found_and_left_out_too() -> None:
    config = {
        "model_type": "mistral3",
        "text_config": {"hidden_size": 8, "quantization_config": {"quant_method": "awq"}},
    }
    assert stored_quantized(config) == "AWQ"
    assert unquantized(config) == {"model_type": "mistral3", "text_config": {"hidden_size": 8}}


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"text_config": {"hidden_size": 8}}])
def test_of_plain_weights_nothing_is_said(config: dict[str, Any]) -> None:
    assert stored_quantized(config) is None
    assert notes_on("acme/model", config, "float32") == ()


def test_code_of_a_models_own_is_said_not_to_be_run() -> None:
    config = {"model_type": "bert", "auto_map": {"AutoModel": "m.JinaBert", "AutoModelForMaskedLM": "m.JinaBert"}}
    (note,) = notes_on("acme/jina", config, "bfloat16")
    assert "its own code (m.JinaBert), which is not run" in note
    assert "'bert'; the two may differ" in note

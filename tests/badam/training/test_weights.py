"""Which weights a run may start from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from badam.errors import InputError
from badam.training.weights import locate_weights
from tests.badam_planner import factories


def directory_of(tmp_path: Path, **config: object) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    return tmp_path


def test_weights_that_are_stored_quantized_are_refused(tmp_path: Path) -> None:
    quantized = directory_of(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InputError, match=r"stored quantized \(GPTQ, 4 bits\); training needs plain ones") as refused:
        locate_weights(factories.model(), str(quantized))
    assert "model.dequantize()" in str(refused.value)
    assert locate_weights(factories.model(), "random") is None


def test_plain_weights_are_taken(tmp_path: Path) -> None:
    assert locate_weights(factories.model(), str(directory_of(tmp_path))) == str(tmp_path)

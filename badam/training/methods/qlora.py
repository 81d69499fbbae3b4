"""Low-rank adapters beside weights in 4 bits (QLoRA, arXiv 2305.14314), by PEFT and bitsandbytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from badam.errors import InputError
from badam.plan import Method, Plan
from badam.training.methods.lora import Lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class QLora(Lora):
    """As LoRA, after every linear layer but the output projection has been quantized to NF4."""

    name: ClassVar[Method] = "qlora"
    libraries = {"peft": "peft", "bitsandbytes": "bitsandbytes"}  # noqa: RUF012 - declared as a class variable by the base

    def check_device(self, device: torch.device) -> None:
        """Refuse everything but CUDA."""
        if device.type != "cuda":
            raise InputError(
                f"qlora trains on CUDA devices only; this run is on {device.type}.",
                advice="Plan with --method lora, which trains anywhere.",
            )

    def prepare(self, model: PreTrainedModel, plan: Plan) -> None:
        """Refuse: the quantized model is not built yet."""
        raise InputError(
            "qlora cannot be prepared by this version: bitsandbytes' quantize_4bit needs weights on a CUDA device.",
            advice="Plan with --method lora.",
        )

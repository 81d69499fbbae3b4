"""Low-rank adapters beside weights in 4 bits (QLoRA, arXiv 2305.14314), by PEFT and bitsandbytes."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from badam.errors import InputError, in_one_line
from badam.plan import Plan
from badam.training.methods.lora import Lora
from badam.vocabulary import Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 64
"""Weights that share one scale, of 8 bits."""

BLOCK_OF_SCALES = 256
"""Scales that share one fp32 scale of their own (double quantisation)."""

ADAPTER, PREFIX = "adapter_model.safetensors", "base_model.model."
BASE = "base.json"
SAMPLE = 64  # bytes of each quantized weight that are compared when a run is resumed


class QLora(Lora):
    """As LoRA, beside linear layers in NF4 with doubly quantized scales; the output projection keeps its 16 bits.

    Everything is computed in bf16, the adapters and their moments included, as in the paper; TRL's trainer sees to that
    by itself. PEFT's ``prepare_model_for_kbit_training`` would make all that is not quantized fp32, activations too.
    Adapters alone are saved, in PEFT's form, and the weights beside them are loaded again where a run goes on.
    """

    name: ClassVar[Method] = "qlora"
    libraries = {"peft": "peft", "bitsandbytes": "bitsandbytes"}  # noqa: RUF012 - declared as a class variable by the base
    saves_adapters_only = True
    quantizes = True
    adapter_dtype = torch.bfloat16

    def check(self, plan: Plan) -> None:
        """Refuse classifications, whose new head would not be saved with PEFT's adapters, and other types than bf16."""
        super().check(plan)
        if plan.training.dtype != "bfloat16":
            raise InputError(
                f"qlora computes in bfloat16; the plan is for {plan.training.dtype}.",
                advice="Plan with --dtype bfloat16, or with --method lora.",
            )
        if plan.model.task != "causal-lm":
            raise InputError(
                "qlora trains language models; the new head of a classification would not be among its adapters.",
                advice="Plan with --method lora.",
            )

    def check_device(self, device: torch.device) -> None:
        """Refuse a device on which the installed bitsandbytes cannot train, by trying."""
        import bitsandbytes
        from bitsandbytes.functional import quantize_4bit

        try:
            weight = torch.ones(BLOCK, BLOCK, dtype=torch.bfloat16, device=device)
            packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
            given = torch.ones(2, BLOCK, dtype=torch.bfloat16, device=device, requires_grad=True)
            bitsandbytes.matmul_4bit(given, packed, quant_state=state).sum().backward()
        except Exception as error:  # a missing kernel shows as whatever the library's loader raises
            raise InputError(
                f"bitsandbytes {bitsandbytes.__version__} cannot train with 4-bit weights on {device.type}: "
                f"{in_one_line(error)}",
                advice="Install another version of bitsandbytes, or plan with --method lora.",
            ) from error

    def loading_options(self, plan: Plan) -> dict[str, Any]:
        """Quantize while loading, weight by weight: the model never exists in 16 bits."""
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        return {"quantization_config": quantization}

    def prepare(self, model: PreTrainedModel, plan: Plan) -> None:
        """Quantize what was not loaded so, then put the adapters in."""
        _quantize(model)
        model.is_loaded_in_4bit = True  # PEFT asks for it
        super().prepare(model, plan)

    def attach(self, model: PreTrainedModel, config: Any) -> None:
        """Through transformers, which then saves the adapters instead of the model."""
        model.add_adapter(config)

    def unnamed_weights(self, model: nn.Module) -> Iterable[tuple[str, Tensor]]:
        """The scales, which bitsandbytes keeps beside the parameters."""
        for name, parameter in model.named_parameters():
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                parts = {"absmax": state.absmax, "code": state.code, "offset": state.offset}
                nested = {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code}
                for part, tensor in {**parts, **nested}.items():
                    yield f"{name}.{part}", tensor

    def quantized_entries(self, model: nn.Module) -> dict[str, int]:
        """Entries of the weights in 4 bits, by parameter."""
        states = ((name, getattr(parameter, "quant_state", None)) for name, parameter in model.named_parameters())
        return {name: state.shape.numel() for name, state in states if state is not None}

    def state_bytes(self, parameters: int, largest_block: int, blocks: int, *, quantized: int = 0) -> int:
        """4 bits per quantized entry, 8 per 64 of them and 32 per 256 * 64; 16 bits per other entry.

        Per trained entry 8 bytes: weight, gradient and two moments in 16 bits.
        """
        scales = -(-quantized // BLOCK) + 4 * -(-quantized // (BLOCK * BLOCK_OF_SCALES))
        return quantized // 2 + scales + 2 * (parameters - quantized) + 8 * largest_block

    def save_besides(self, model: PreTrainedModel, directory: Path) -> None:
        """What tells the weights beside the adapters from others."""
        (directory / BASE).write_text(json.dumps({"checksum": _checksum(model)}), encoding="utf-8")

    def load(self, model: PreTrainedModel, checkpoint: Path) -> None:
        """Take a checkpoint's adapters.

        Raises:
            InputError: if they were trained beside other weights than those of ``model``.
        """
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        if json.loads((checkpoint / BASE).read_text(encoding="utf-8"))["checksum"] != _checksum(model):
            raise InputError(
                f"The adapters in {checkpoint} were trained beside other weights than those of this run.",
                advice="Resume with the --init and --seed that the run was started with.",
            )
        adapters = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(checkpoint / ADAPTER).items()}
        set_peft_model_state_dict(model, adapters)

    def finish(self, model: PreTrainedModel) -> None:
        """Nothing: merged into weights of 4 bits, the adapters would be rounded away."""


def _quantize(model: PreTrainedModel) -> None:
    """Replace linear layers by bitsandbytes', as transformers does in loading, and let them train on any device."""
    from bitsandbytes.nn import Linear4bit
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = get_keys_to_not_convert(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and should_convert_module(name, kept):
            model.set_submodule(name, _quantized(module))
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # Where the CPU has the instructions, a pass without gradients (an evaluation) would repack the weights for
            # a kernel that has no backward, and training would go on without gradients below.
            module.support_avx512bf16_for_cpu = False


def _quantized(linear: nn.Linear) -> nn.Module:
    """bitsandbytes' layer with the weight of ``linear`` in NF4."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = linear.weight.detach()
    is_fake = isinstance(weight, FakeTensor)
    options: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
    with _plain_parameters() if is_fake else torch.device("meta"):
        layer: nn.Module = Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, **options
        )
    layer.bias = linear.bias
    if is_fake:
        layer.weight = _packed_without_data(weight, options)
    else:
        parameter = Params4bit(weight, requires_grad=False, blocksize=BLOCK, module=layer, **options)
        layer.weight = parameter.to(weight.device)
    return layer.train(linear.training)


@contextmanager
def _plain_parameters() -> Iterator[None]:
    """bitsandbytes' class of parameters cannot hold a tensor without data; its layers run with plain ones as well."""
    from bitsandbytes.nn import modules

    with patch.object(modules, "Params4bit", lambda data, **_: nn.Parameter(data, requires_grad=False)):
        yield


def _packed_without_data(weight: Tensor, options: dict[str, Any]) -> nn.Parameter:
    """What quantizing ``weight`` leaves, in shapes and types alone; the quantizer itself reads real tables."""
    from bitsandbytes.functional import QuantState

    entries, device = weight.numel(), weight.device
    scales = -(-entries // BLOCK)

    def single(count: int) -> Tensor:
        return torch.empty(count, dtype=torch.float32, device=device)

    parameter = nn.Parameter(torch.empty((entries + 1) // 2, 1, dtype=torch.uint8, device=device), requires_grad=False)
    state = QuantState(
        absmax=torch.empty(scales, dtype=torch.uint8, device=device),
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=BLOCK,
        code=single(16),
        quant_type=options["quant_type"],
        offset=torch.empty((), dtype=torch.float32, device=device),
        state2=QuantState(
            absmax=single(-(-scales // BLOCK_OF_SCALES)),
            code=single(256),
            blocksize=BLOCK_OF_SCALES,
            dtype=torch.float32,
        ),
    )
    for name, value in {**options, "quant_state": state}.items():
        setattr(parameter, name, value)
    return parameter


def _checksum(model: nn.Module) -> int:
    """Of a sample of every weight in 4 bits."""
    checksum = 0
    for parameter in model.parameters():
        if getattr(parameter, "quant_state", None) is not None:
            checksum = zlib.crc32(parameter.detach().view(-1)[:SAMPLE].cpu().numpy().tobytes(), checksum)
    return checksum

"""What another version of transformers keeps for backward, where a published run used it.

python -m benchmarks.by_version                                      # the installed version
PYTHONPATH=DIRECTORY python -m benchmarks.by_version                 # one that pip installed with --target DIRECTORY

Nothing is trained and no weights are needed: Llama is run on tensors without data, with eager attention.
"""

from __future__ import annotations

import json
import warnings
from typing import Any

import torch
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from badam import phases
from badam.vocabulary import Phase
from badam_planner.recording.recording import TensorRole
from badam_planner.recording.timeline import Timeline
from badam_planner.rehearsal.tracker import StorageTracker

LLAMA_2 = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
LLAMA_3 = {**LLAMA_2, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}


def peak_bytes(config: dict[str, Any], layers: int, batch: int, length: int, *, trained: bool) -> int:
    """Highest live bytes of forward and backward above those of the weights.

    Args:
        config: sizes of a Llama.
        layers: how many it has.
        batch, length: of the input.
        trained: whether all weights are, or the last layer's alone.
    """
    facts = transformers.LlamaConfig(num_hidden_layers=layers, use_cache=False, pad_token_id=None, **config)
    facts._attn_implementation = "eager"
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = transformers.LlamaForCausalLM(facts).train()
        finally:
            torch.set_default_dtype(torch.float32)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained or f"layers.{layers - 1}." in name)
        tokens = torch.zeros(batch, length, dtype=torch.int64)
        phases.enter(Phase.SETUP)
        tracker = StorageTracker(model)
        weights: dict[int, Tensor] = {each.untyped_storage()._cdata: each for each in model.parameters()}
        tracker.tell(((str(key), tensor) for key, tensor in weights.items()), TensorRole.PARAMETER)
        resident = sum(tensor.untyped_storage().nbytes() for tensor in weights.values())
        with tracker.watching():
            phases.enter(Phase.FORWARD)
            loss = model(input_ids=tokens, labels=tokens).loss
            phases.enter(Phase.BACKWARD)
            at_the_turn = Timeline(tracker.recording).live_at(tracker.recording.end)
            kept = sum(nbytes for *_, nbytes in at_the_turn) - resident
            loss.backward()
        return kept if trained else Timeline(tracker.recording).peak().nbytes - resident


def main() -> None:
    """Print what is kept per layer, and what the loss takes, as JSON."""
    warnings.simplefilter("ignore")
    transformers.PreTrainedModel._init_weights = lambda _self, _module: None  # type: ignore[method-assign,assignment]
    one, two = (peak_bytes(LLAMA_2, layers, 8, 512, trained=True) for layers in (1, 2))
    found = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "llama_2_kept_bytes_per_layer_8x512": two - one,
        "llama_2_kept_bytes_outside_layers_8x512": 2 * one - two,
        "llama_3_last_block_peak_bytes_2x728": peak_bytes(LLAMA_3, 1, 2, 728, trained=False),
        "llama_2_last_block_peak_bytes_8x728": peak_bytes(LLAMA_2, 1, 8, 728, trained=False),
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

"""Tiny random models and batches that tests share, built from a configuration in milliseconds."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from typing import Any

import hypothesis
import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

from badam.errors import InputError

ModelFactory = Callable[..., nn.Module]
BatchFactory = Callable[..., Tensor]

# By the processor's instructions oneDNN chooses kernels, and with them the scratch that a bf16 product takes of torch
# memory. With those that all processors have, none is taken, and tests that compare bytes find the same everywhere.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")

# How long an example takes says nothing on a machine that others use too.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

VOCABULARY = 64
RUN_BY_EVERY_CHANGE = Version("5.23")  # of transformers, see constraints.txt


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None]:
    """Skip what an older transformers has written in a way that cannot be rehearsed; that this is said has its test."""
    from transformers import __version__

    try:
        yield
    except InputError as error:
        if Version(__version__) >= RUN_BY_EVERY_CHANGE or "cannot be planned with transformers" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests run beside each other and beside other work; a second thread only makes them slower."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny_llama() -> ModelFactory:
    """Makes a Llama of hidden size 32 with 3 layers; the same weights for the same ``seed``."""

    def make(*, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **changes: Any) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        settings: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            "use_cache": False,
        }
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).to(dtype)

    return make


@pytest.fixture
def token_batch() -> BatchFactory:
    """Makes token ids of shape (batch, length) for :func:`tiny_llama`; the same ones for the same ``seed``."""

    def make(seed: int = 0, *, batch: int = 2, length: int = 16) -> Tensor:
        return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))

    return make

"""The tokenizer of a run: the model's own, or a byte-level one trained on the spot."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

from badam.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PADDING, BEGIN, END_OF_TEXT = SPECIAL_TOKENS = ("<|pad|>", "<|begin|>", "<|end|>")
"""Their ids are 0, 1 and 2, as configurations of Llama models have it."""

ALPHABET = 256  # every byte is a token, so that no text is unknown

CHAT_TEMPLATE = (
    "{% if tools %}{{ '### tools:\n' + (tools | tojson) + '\n\n' }}{% endif %}"
    "{% for message in messages %}{{ '### ' + message.role }}{% if message.name %}{{ ' ' + message.name }}{% endif %}"
    "{{ ':\n' }}{% if message.role == 'assistant' %}{% generation %}"
    "{% if message.reasoning_content %}{{ '<think>\n' + message.reasoning_content + '\n</think>\n' }}{% endif %}"
    "{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}"
    "{% endfor %}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
"""For chat data and a tokenizer without a template: speakers by name, and marks around what the assistant says."""


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of at most ``vocabulary_size`` tokens, the same for the same texts.

    Raises:
        InputError: if the vocabulary is too small for all bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    smallest = ALPHABET + len(SPECIAL_TOKENS)
    if vocabulary_size < smallest:
        raise InputError(
            f"A byte-level tokenizer needs {smallest} tokens; the model's vocabulary has {vocabulary_size}.",
            advice="Choose a model with a larger vocabulary.",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PADDING, bos_token=BEGIN, eos_token=END_OF_TEXT
    )
    return cast("PreTrainedTokenizerBase", wrapped)


def load_tokenizer(weights: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a Hub id or directory.

    It may have more tokens than the model has rows, as many do: what counts are those that the data uses.

    Raises:
        InputError: if there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(weights))
    except (OSError, ValueError) as error:
        raise InputError(
            f"No tokenizer could be loaded from {weights}.",
            advice="Give a directory that has one, or --init random, which trains one on the data.",
        ) from error
    return tokenizer


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that padding is on the right, where the causal mask hides it, and that there is a token for it."""
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

"""The tokenizer that is trained on the spot, and the docstrings that every machine has."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from badam.errors import DataError, InputError
from badam.training.data import demo as demo_data
from badam.training.data.demo import docstring_pairs, stdlib_docstrings
from badam.training.data.tokenizer import CHAT_TEMPLATE, load_tokenizer, prepare_tokenizer, train_tokenizer

TEXTS = ["the cat sat on the mat", "the dog sat on the log"] * 3
SMALL = train_tokenizer(TEXTS, 300)


def digest(tokenizer: PreTrainedTokenizerBase) -> str:
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


@given(st.text(max_size=40))
def test_every_text_survives_tokenization(text: str) -> None:
    if any(0xD800 <= ord(character) <= 0xDFFF for character in text):
        return  # half of a surrogate pair is no text
    assert SMALL.decode(SMALL(text)["input_ids"]) == text


def test_the_same_texts_give_the_same_tokenizer() -> None:
    assert digest(train_tokenizer(TEXTS, 300)) == digest(train_tokenizer(iter(TEXTS), 300))
    assert len(SMALL) <= 300


def test_special_tokens_have_the_ids_of_llama_configurations() -> None:
    assert (SMALL.pad_token_id, SMALL.bos_token_id, SMALL.eos_token_id) == (0, 1, 2)


def test_a_vocabulary_too_small_for_all_bytes_is_refused() -> None:
    with pytest.raises(InputError, match="needs 259 tokens; the model's vocabulary has 128"):
        train_tokenizer(TEXTS, 128)


def test_the_tokenizer_of_a_directory_is_loaded(tmp_path: Path) -> None:
    SMALL.save_pretrained(tmp_path)
    assert digest(load_tokenizer(str(tmp_path))) == digest(SMALL)


def test_a_directory_without_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--init random"):
        load_tokenizer(str(tmp_path))


def test_padding_is_on_the_right_and_always_possible() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.pad_token = None
    tokenizer.padding_side = "left"
    prepare_tokenizer(tokenizer)
    assert tokenizer.padding_side == "right"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_the_chat_template_marks_what_the_assistant_says() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.chat_template = CHAT_TEMPLATE
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    found: Any = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [token for token, mark in zip(found["input_ids"], found["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "sat" + tokenizer.eos_token


SOURCE = '''
"""A module with a docstring that is long enough."""

class Point(Base, metaclass=Meta):
    """Two coordinates in the plane of this page."""

    async def move(self, dx: int, *, dy=1):
        """   Go somewhere else, by the given distance."""

def short():
    """Too short."""

def undocumented():
    pass
'''


def test_docstrings_become_pairs_of_signature_and_text(tmp_path: Path) -> None:
    package = tmp_path / "geometry"
    package.mkdir()
    (package / "__init__.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def (:")
    (tmp_path / "test").mkdir()
    (tmp_path / "test/more.py").write_text(SOURCE)
    assert list(docstring_pairs(tmp_path)) == [
        {
            "prompt": "# geometry\nmodule geometry:\n",
            "completion": "A module with a docstring that is long enough.",
        },
        {
            "prompt": "# geometry\nclass Point(Base):\n",
            "completion": "Two coordinates in the plane of this page.",
        },
        {
            "prompt": "# geometry\ndef move(self, dx: int, *, dy=1):\n",
            "completion": "Go somewhere else, by the given distance.",
        },
    ]


def test_docstrings_are_kept_for_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "library"
    library.mkdir()
    (library / "geometry.py").write_text(SOURCE)
    monkeypatch.setattr(demo_data.sysconfig, "get_path", lambda _: str(library))
    first = stdlib_docstrings(tmp_path / "cache")
    (library / "geometry.py").unlink()
    assert stdlib_docstrings(tmp_path / "cache") == first
    with pytest.raises(DataError, match="no sources"):
        stdlib_docstrings(tmp_path / "another")

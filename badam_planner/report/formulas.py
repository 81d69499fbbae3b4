"""The closed form of each method's model states in words, as methods compute it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from badam.vocabulary import Method

FORMULAS: Mapping[Method, str] = {
    "badam": "2M+16M/D",
    "hift": "2M+16M/D",
    "badam-ratio": "2M+16T",
    "lisa": "2M+16T",
    "lora": "2M+16T",
    "qlora": "2M-1.484Q+8T",
    "adam": "18M",
    "galore": "4M",
    "lomo": "2M",
    "adalomo": "2M",
    "mezo": "2M",
}
"""M: parameters of the model, D: blocks, T: entries trained at a time, Q: entries in 4 bits, which with their scales
take 0.516 bytes instead of 2. Bytes; see ``state_bytes`` of each method."""

LETTERS: Mapping[str, str] = {
    "M": "M parameters",
    "D": "D blocks",
    "T": "T entries trained at a time",
    "Q": "Q entries in 4 bits",
}


def formula_of(method: str) -> str:
    """The closed form of one method; "states" of one that has none here."""
    return next((formula for known, formula in FORMULAS.items() if known == method), "states")


def formulas_in_words(methods: Iterable[str]) -> str:
    """Which closed form belongs to which of ``methods``: ``2M+16M/D (badam, hift), 2M (lomo)``."""
    groups: dict[str, list[str]] = {}
    for method in dict.fromkeys(methods):
        groups.setdefault(formula_of(method), []).append(method)
    return ", ".join(f"{formula} ({', '.join(names)})" for formula, names in groups.items())


def letters_in_words(methods: Iterable[str]) -> str:
    """What the letters in the closed forms of ``methods`` stand for."""
    used = "".join(FORMULAS[method] for method in FORMULAS if method in set(methods))
    return ", ".join(words for letter, words in LETTERS.items() if letter in used)

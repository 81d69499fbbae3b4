"""Small pieces of text that every renderer needs. Bytes become text in badam.units only."""

from __future__ import annotations

from badam.units import format_bytes
from badam_planner.compare import Pair

NOTHING = "-"
"""Shown where a figure does not exist."""


def clean(name: str) -> str:
    """``name`` without characters that would steer a terminal; names come from files that anyone may have written."""
    return "".join(character if character.isprintable() else "?" for character in name)


def shorten(name: str, width: int) -> str:
    """``name`` in at most ``width`` characters; both ends stay, since a module path is told apart by its ends."""
    if len(name) <= width:
        return name
    tail = (width - 1) * 2 // 3
    return name[: width - 1 - tail] + "…" + (name[-tail:] if tail else "")


def bytes_or_nothing(size: int | None) -> str:
    return NOTHING if size is None else format_bytes(size)


def signed_bytes(size: int | None) -> str:
    if size is None:
        return NOTHING
    return "exact" if size == 0 else f"{'+' if size > 0 else ''}{format_bytes(size)}"


def signed_percent(fraction: float | None) -> str:
    return NOTHING if fraction is None else f"{fraction:+.2%}"


def error_percent(pair: Pair) -> str:
    """The error of a pair as a percentage of the measured bytes."""
    if pair.error_fraction is None and pair.error_bytes is not None:
        return "none measured"
    return signed_percent(pair.error_fraction)


def error_in_words(pair: Pair) -> str:
    """The error of a pair for a sentence: ``1.23% (256.00 MiB) too low``."""
    error = pair.error_bytes
    if not error:
        return "exact" if error == 0 else "not measured"
    share = "" if pair.error_fraction is None else f"{abs(pair.error_fraction):.2%}, "
    return f"{share}{format_bytes(abs(error))} too {'high' if error > 0 else 'low'}"

"""Small pieces of text that every renderer needs. Bytes become text in badam.units only."""

from __future__ import annotations

from dataclasses import dataclass

from badam.units import GIB, MIB, format_bytes, format_gib
from badam_planner.accuracy.comparison import Pair

NOTHING = "-"
"""Shown where a figure does not exist."""


@dataclass(frozen=True, slots=True)
class SizeUnit:
    """The unit that a table or a set of bars shares, so that its numbers compare at a glance."""

    name: str
    factor: int

    def number(self, size: int) -> str:
        """``size`` bytes as a number in this unit."""
        return format_gib(size * (GIB // self.factor))


def unit_for(largest: int) -> SizeUnit:
    """GiB, or MiB where the largest number would begin with a zero."""
    return SizeUnit("GiB", GIB) if largest >= GIB else SizeUnit("MiB", MIB)


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


def percent(fraction: float) -> str:
    """A share without its sign; one that is not zero is never shown as zero."""
    if 0 < abs(fraction) < 0.00005:
        return "<0.01%"
    return f"{abs(fraction):.2%}"


def signed_percent(fraction: float | None) -> str:
    if fraction is None:
        return NOTHING
    sign = "-" if fraction < 0 else ("+" if fraction > 0 else "")
    return f"{sign}{percent(fraction)}"


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
    share = "" if pair.error_fraction is None else f"{percent(pair.error_fraction)}, "
    return f"{share}{format_bytes(abs(error))} too {'high' if error > 0 else 'low'}"

"""The one place where bytes and seconds become text. GiB = 2**30, GB = 10**9."""

from __future__ import annotations

import re
from fractions import Fraction

from badam.errors import InputError

KIB, MIB, GIB = 2**10, 2**20, 2**30
GB = 10**9

_FACTORS = {"": 1, "B": 1, "KIB": KIB, "MIB": MIB, "GIB": GIB, "KB": 10**3, "MB": 10**6, "GB": GB, "TIB": 2**40}


def format_bytes(size: int, *, digits: int = 2) -> str:
    """``size`` bytes as text in the largest binary unit that keeps the number at 1 or above."""
    magnitude = abs(size)
    for name, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if magnitude >= factor:
            return f"{size / factor:.{digits}f} {name}"
    return f"{size} B"


def format_gib(size: int, *, digits: int = 2) -> str:
    """``size`` bytes as a number of GiB, without the unit, for table columns that name it."""
    return f"{size / GIB:.{digits}f}"


def format_seconds(seconds: float, *, rough: bool = False) -> str:
    """A duration as text: ``1.2 ms``, ``3.45 s``, ``5 min 06 s``, ``7 h 08 min``; an estimate has fewer digits."""
    if seconds < 1:
        return f"{seconds * 1e3:.{0 if rough and seconds >= 0.01 else 1}f} ms"
    if seconds < 60:
        return f"{seconds:.{1 if rough else 2}f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def format_count(count: int) -> str:
    """A number of parameters as text: ``6.74 B``, ``13.1 M``."""
    for name, factor in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= factor:
            return f"{count / factor:.2f} {name}"
    return str(count)


def parse_bytes(text: str) -> int:
    """Bytes from text such as ``24GiB``, ``23.7 GB`` or ``1073741824``.

    Raises:
        InputError: if the text is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    factor = _FACTORS.get(match.group(2).upper()) if match else None
    size = int(Fraction(match.group(1)) * factor) if match and factor else 0
    if size <= 0:
        raise InputError(f"{text!r} is not a size of memory.", advice="Write a number with a unit, such as 24GiB.")
    return size


def format_batch(task: str, batch_size: int, seq_len: int, decoder_len: int | None = None) -> str:
    """What is in a micro-batch, such as ``8 x 512 tokens``.

    Args:
        task: of the plan.
        batch_size: examples.
        seq_len: positions of an example.
        decoder_len: tokens that a decoder learns to write for it; None where there is no decoder of its own.
    """
    things = {"image-classification": "images of {} positions", "speech-to-text": "recordings of {} positions"}
    text = f"{batch_size} {things.get(task, 'x {} tokens').format(seq_len)}"
    return text if decoder_len is None else f"{text} into {decoder_len}"

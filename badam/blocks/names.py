"""Parameters and blocks by name: the words in which a partition is written. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable
from dataclasses import dataclass

_ROWS = re.compile(r"\[(\d+):(\d+)\]$")


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """One distinct parameter: its dotted name and its shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether this is a weight that mixes channels, not a norm, bias or scale."""
        return len(self.shape) >= 2


@dataclass(frozen=True, slots=True)
class Block:
    """A set of parameters trained together: those whose name lies under one of ``prefixes``.

    A prefix may end in a range of rows, ``lm_head.weight[0:4096]``: then only these rows are trained.
    """

    name: str
    prefixes: tuple[str, ...]
    parameters: int  # number of entries


def belongs(name: str, prefixes: Iterable[str]) -> bool:
    """Whether parameter ``name`` lies under one of ``prefixes``, compared on module boundaries.

    ``layers.1`` holds ``layers.1.weight`` and not ``layers.11.weight``; a trailing dot changes nothing.
    """
    for prefix in prefixes:
        path = _ROWS.sub("", prefix).rstrip(".")
        if name == path or name.startswith(path + "."):
            return True
    return False


def enclosing(path: str, modules: Container[str]) -> str:
    """The closest of ``modules`` (dotted paths) that ``path`` is or lies in; "" if it is in none."""
    while path and path not in modules:
        path = path.rpartition(".")[0]
    return path


def rows_of(name: str, prefixes: Iterable[str]) -> tuple[int, int] | None:
    """The rows ``(first, end)`` of parameter ``name`` that ``prefixes`` select, or None for the whole parameter."""
    for prefix in prefixes:
        if belongs(name, (prefix,)):
            match = _ROWS.search(prefix)
            return (int(match.group(1)), int(match.group(2))) if match else None
    return None

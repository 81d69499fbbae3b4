"""What the saved states of both optimizers have in common: their format, and parameter groups that must match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from badam.errors import StateError

FORMAT = 2
"""Version of the saved states; those of badam 1.4, which do not say what they belong to, count as 1."""


def with_format(fields: Mapping[str, Any]) -> dict[str, Any]:
    """``fields`` with the version that :func:`read_fields` asks for."""
    return {"format": FORMAT, **fields}


def read_fields(saved: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The values of ``names`` in a saved state.

    Raises:
        StateError: if it has another format or lacks one of them.
    """
    if saved.get("format") != FORMAT:
        raise StateError(f"The optimizer state has format {saved.get('format')!r}; this version reads {FORMAT}.")
    try:
        return {name: saved[name] for name in names}
    except KeyError as error:
        raise StateError(f"The optimizer state lacks {error}; it was not saved completely.") from error


def check_group_sizes(saved: Sequence[Mapping[str, Any]], here: Sequence[int]) -> None:
    """Refuse a state whose parameters are grouped otherwise: positions in it would mean other parameters.

    Args:
        saved: the groups of the state.
        here: parameters in each group of the optimizer that is to load it.

    Raises:
        StateError: with the sizes of both groupings.
    """
    there = [len(group["params"]) for group in saved]
    if there != list(here):
        raise StateError(
            f"The optimizer state was saved with parameter groups of {there} parameters; here they have {list(here)}.",
            advice="Group the parameters as they were grouped when the state was saved.",
        )

"""Libraries that a plain installation does not have."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from badam.errors import InputError


def require(what: str, libraries: Mapping[str, str], *, extra: str) -> None:
    """Refuse ``what`` in a sentence if it needs libraries that are not installed.

    Args:
        what: that needs them, as the subject of the sentence.
        libraries: distribution by module.
        extra: of this distribution, which installs them; several with commas between.

    Raises:
        InputError: with the names of those that are missing and how to install them.
    """
    missing = [library for module, library in libraries.items() if find_spec(module) is None]
    if missing:
        *others, last = missing
        listed = f"{', '.join(others)} and {last}" if others else last
        raise InputError(
            f"{what} needs {listed}, which cannot be imported here.",
            advice=f"Install it with: pip install 'badam[{extra}]'.",
        )

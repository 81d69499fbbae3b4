"""One exception family, each member with the exit code a command returns for it.

An error says what happened, the number that matters, and what to do next; the last part is ``advice``, so that a
command can print it on a line of its own. Members are also what torch's optimizers and allocators raise in their place,
``ValueError`` or ``RuntimeError``: a host that catches those catches these.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec


class BadamError(Exception):
    """Base of every error a user can cause or meet. ``exit_code`` is what a command returns for it."""

    exit_code = 2

    def __init__(self, message: str, *, advice: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.advice = advice

    def __str__(self) -> str:
        return self.message if self.advice is None else f"{self.message} {self.advice}"


class InputError(BadamError, ValueError):
    """Something the user gave is missing, malformed or unknown."""


class PlanError(InputError):
    """A plan or a measured run cannot be read: missing, truncated, of another version, or edited into nonsense."""


class DataError(InputError):
    """Training data is empty, unreadable or lacks the columns that training needs."""


class StateError(InputError):
    """A saved optimizer state does not belong to this model or partition."""


class RanksDisagree(BadamError):
    """The processes of one run would train different things, or one of them did not come where all should meet."""


class DoesNotFit(BadamError):
    """The answer is no: the configuration needs more memory than the GPU has."""

    exit_code = 1


class OutOfMemory(BadamError, RuntimeError):
    """The device refused an allocation in a run."""

    exit_code = 3


def in_one_line(error: BaseException, most: int = 200) -> str:
    """An exception from other code as part of a sentence: its class and the start of its message."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= most else f"{text[:most]}…"


def near_matches(name: str, known: Iterable[str], limit: int = 5) -> list[str]:
    """Known names that resemble ``name``, best first; case and punctuation do not matter."""

    def fold(text: str) -> str:
        return "".join(character for character in text.lower() if character.isalnum())

    folded: dict[str, str] = {}
    for candidate in known:
        folded.setdefault(fold(candidate), candidate)
    wanted = fold(name)
    inside = [original for key, original in folded.items() if wanted and (wanted in key or key in wanted)]
    close = [folded[key] for key in difflib.get_close_matches(wanted, list(folded), n=limit, cutoff=0.5)]
    return list(dict.fromkeys([*close, *sorted(inside, key=len)]))[:limit]


def check_choice(option: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a ``value`` of ``option`` that is not one of ``choices``.

    Raises:
        InputError: with the choices.
    """
    choices = tuple(choices)
    if value not in choices:
        raise InputError(f"Unknown {option} {value!r}.", advice=f"Choose {', '.join(choices[:-1])} or {choices[-1]}.")


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


def missing_library(what: str, error: ImportError) -> InputError:
    """What to raise where code of another library misses a third one.

    Args:
        what: cannot be had without it, such as a model.
        error: as transformers raises it, with the command that installs the library in its text, or as Python does.
    """
    text = " ".join(str(error).split())
    named = re.search(r"pip install (?:-U )?([\w.-]+)", text)
    package = named[1].rstrip(".") if named else (error.name or "").partition(".")[0]
    if not package:
        return InputError(f"{what} needs a library that is not installed: {text}")
    return InputError(f"{what} needs {package}, which is not installed.", advice=f"Install it: pip install {package}.")

"""What the three commands share: one way to end, one way to speak. Imports nothing heavy."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from badam.errors import BadamError


@contextmanager
def reporting_errors() -> Iterator[None]:
    """Turn a :class:`badam.errors.BadamError` into sentences on stderr and its exit code; no traceback.

    ``BADAM_TRACEBACK=1`` in the environment keeps the traceback, for people who debug.
    """
    try:
        yield
    except BadamError as error:
        if os.environ.get("BADAM_TRACEBACK"):
            raise
        say(f"error: {error.message}")
        if error.advice:
            say(f"       {error.advice}")
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        say("interrupted")
        raise typer.Exit(130) from error


def say(text: str) -> None:
    """A line for the person at the terminal; stdout stays free for results."""
    print(text, file=sys.stderr, flush=True)

"""What the three commands share: one way to end, one way to speak. Imports nothing heavy."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from badam.errors import BadamError, InputError
from badam.training.one_voice import leave_error_file, rank_and_count, told, words_for


def _print_version(context: typer.Context, wanted: bool) -> None:
    if wanted:
        import badam

        print(context.info_name, badam.__version__)
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
]
"""The option ``--version`` of each command."""


class OneVoice(TyperCommand):
    """A command whose wrong options, of several processes, the first alone complains of."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """As usual; the other processes end without a word."""
        try:
            return super().make_context(*arguments, **options)
        except Exception as error:  # typer has no public class for it
            if rank_and_count()[0] == 0 or getattr(error, "exit_code", None) != 2:
                raise
            leave_error_file(str(error))
            raise SystemExit(2) from error


@contextmanager
def reporting_errors() -> Iterator[None]:
    """Turn a :class:`badam.errors.BadamError` into sentences on stderr and its exit code; no traceback.

    ``BADAM_TRACEBACK=1`` in the environment keeps the traceback, for people who debug.
    """
    try:
        yield
        sys.stdout.flush()  # what a full disk does not take is known here, and not when the interpreter ends
    except BadamError as error:
        if os.environ.get("BADAM_TRACEBACK"):
            raise
        _report(error)
        raise typer.Exit(error.exit_code) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _leave_standard_output()
        full = InputError(
            f"{error.filename or 'The standard output'} could not be written: {error.strerror}.",
            advice="Make room on its disk, or write to another one.",
        )
        _report(full)
        raise typer.Exit(full.exit_code) from error
    except KeyboardInterrupt as error:
        if rank_and_count()[0] == 0:
            say(str(error) or "interrupted")
        raise typer.Exit(128 + getattr(error, "signal", signal.SIGINT)) from error
    except SystemExit:  # the first process has told the others to end
        leave_error_file("ended because the first process did")
        raise


def _leave_standard_output() -> None:
    """Let what is still buffered for it go nowhere: it would fail once more when the interpreter ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _report(error: BadamError) -> None:
    """Say what went wrong, and what to do, once for all processes."""
    begin = words_for(error)
    if begin is not None:
        say(f"{begin}: {error.message}")
        if error.advice:
            say(f"       {error.advice}")
    told(error)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process as it stands, while libraries are imported and nothing is written.

    Some of them turn a KeyboardInterrupt into an error of their own. Where it is ignored it stays so.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        if rank_and_count()[0] == 0:
            say("interrupted")
        os._exit(128 + number)

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def say(text: str) -> None:
    """A line for the person at the terminal; stdout stays free for results."""
    print(text, file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """Libraries speak only of errors, unless the user asked for more; before they are imported, where they ask."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # installed or not, most runs have no use for it
    # Where DeepSpeed is installed transformers imports it; it sets its own level, and warns on the standard output.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", r".*Please use `torch\.distributed", FutureWarning)  # DeepSpeed calls old names
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

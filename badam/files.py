"""Writing files: whole or not at all, and never in the place of something that is not a file. No torch.

Every file of this project is written through :func:`write_file`. What stands at the path decides how:

- nothing, or a regular file: the content goes to a new file beside it, which then takes its name, so that a reader, a
  full disk or a killed process never leaves half of it;
- a symbolic link: the same with what it points to, the link stays;
- a FIFO, a device or a socket's like: the content is written into it, nothing is replaced;
- what this process has as its standard output: the content is written there, after what was written before;
- a directory: an error.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from badam.errors import InputError

PATIENCE_SECONDS = 30.0
"""How long a FIFO may have no reader before writing to it is given up."""

CACHE_DIRECTORY, DATA_DIRECTORY = "BADAM_CACHE_DIR", "BADAM_DATA_DIR"
"""Environment variables that name other directories than the user's usual ones."""


def cache_directory() -> Path:
    """Where files that can be made again are kept: $BADAM_CACHE_DIR, or the user's cache of this project.

    Raises:
        InputError: if the user has no home directory.
    """
    from platformdirs import user_cache_path

    return _own_or(CACHE_DIRECTORY, lambda: user_cache_path("badam", appauthor=False))


def data_directory() -> Path:
    """Where data of this user is kept that outlives a project: $BADAM_DATA_DIR, or the user's data of this project.

    Raises:
        InputError: if the user has no home directory.
    """
    from platformdirs import user_data_path

    return _own_or(DATA_DIRECTORY, lambda: user_data_path("badam", appauthor=False))


def _own_or(variable: str, usual: Callable[[], Path]) -> Path:
    if own := os.environ.get(variable):
        return Path(own)
    directory = usual()
    if not directory.is_absolute():  # "~" of a user whom the system does not know
        raise InputError("This user has no home directory.", advice=f"Name a directory in {variable}.")
    return directory


def write_file(path: str | Path, content: str | bytes, *, parents: bool = False) -> None:
    """Write ``content`` to ``path``, text as UTF-8.

    Args:
        path: of the file. An older regular file keeps its permissions.
        content: all of it.
        parents: make the directories that are missing.

    Raises:
        InputError: if it cannot be written, with the system's reason; what was there before is still there.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, data)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL, or with what its encoding does not have
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise InputError(f"Cannot write {path}: {reason}.", advice="Choose another path.") from error


def _write(path: Path, data: bytes) -> None:
    try:
        status = path.stat()
    except FileNotFoundError:
        _replace(Path(os.path.realpath(path)), data, None)
        return
    own = _own_stream(status)
    if own is not None:
        _write_all(os.dup(own), data)
    elif stat.S_ISREG(status.st_mode):
        _replace(Path(os.path.realpath(path)), data, stat.S_IMODE(status.st_mode))
    elif stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a directory", str(path))
    else:
        _write_all(_opened(path), data)


def _replace(path: Path, data: bytes, mode: int | None) -> None:
    """Give a new file with ``data`` the name ``path``, which names a regular file or nothing."""
    if mode is not None and not os.access(path, os.W_OK):  # renaming asks the directory only
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    temporary = path.parent / f".{os.getpid()}.{secrets.token_hex(4)}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        if mode is not None:
            os.fchmod(descriptor, mode)
        _write_all(descriptor, data, to_disk=True)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _opened(path: Path) -> int:
    """A FIFO or device, open for writing; a FIFO once somebody reads it."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ENXIO or not stat.S_ISFIFO(path.stat().st_mode):
                raise
            if time.monotonic() > deadline:
                raise OSError(errno.ENXIO, f"nobody has read this FIFO for {PATIENCE_SECONDS:g} s") from error
            time.sleep(0.02)
        else:
            os.set_blocking(descriptor, True)
            return descriptor


def _write_all(descriptor: int, data: bytes, *, to_disk: bool = False) -> None:
    """Write ``data`` and close the descriptor."""
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        left = memoryview(data)
        while left:
            left = left[file.write(left) or 0 :]
        if to_disk:
            os.fsync(file.fileno())


def _own_stream(status: os.stat_result) -> int | None:
    """The standard output or error of this process, if ``status`` is of it: replacing it would lose what it gets."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, replaced, or without a descriptor
            stream.flush()
            if os.path.samestat(os.fstat(stream.fileno()), status):
                return stream.fileno()
    return None

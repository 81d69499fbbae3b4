"""What a run leaves on disk: whole or not at all. No torch.

A directory is written under a temporary name, brought to the disk, given a list of its files with their sizes, and
renamed. A reader therefore finds complete checkpoints only, and :func:`newest_whole` also passes over one that was
damaged later.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from badam.errors import InputError
from badam.units import format_bytes

MANIFEST = "files.json"
MODEL_DIRECTORY = "model"
ASIDE = ".old.partial"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def prepare_output(directory: Path, *, resume: bool) -> None:
    """Make sure that a run can write into ``directory``.

    Raises:
        InputError: if it cannot be written, or holds something and the run does not resume.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
        entries = list(directory.iterdir())
    except OSError as error:
        raise InputError(
            f"The output directory {directory} cannot be written: {error.strerror or error}.",
            advice="Choose another with --output-dir.",
        ) from error
    if entries and not resume:
        raise InputError(
            f"The output directory {directory} is not empty ({len(entries)} entries, such as {entries[0].name}).",
            advice="Continue the run in it with --resume, or choose another with --output-dir.",
        )
    _remove_leftovers(directory)


@contextmanager
def removed_if_unused(directory: Path) -> Iterator[None]:
    """Of a run that fails before it has written anything leave no empty directory that was not there before."""
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in new:
            try:
                path.rmdir()
            except OSError:  # it is not empty, or was never made
                break
        raise


def _remove_leftovers(directory: Path) -> None:
    """What a run that was killed was writing; a finished directory that it was about to replace comes back."""
    for aside in directory.glob(f".*{ASIDE}"):
        target = directory / aside.name[1:].removesuffix(ASIDE)
        if not target.exists():
            aside.rename(target)
    for leftover in (*directory.glob(".*.partial"), *directory.glob(".*.tmp")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def check_space(directory: Path, needed_bytes: int) -> None:
    """Refuse a run whose results would not fit on the disk: better before it than after.

    Raises:
        InputError: with what is free and what is needed.
    """
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise InputError(
            f"The disk of {directory} has {format_bytes(free)} free; the run writes {format_bytes(needed_bytes)}.",
            advice="Make room, or choose a directory on another disk with --output-dir.",
        )


def new_run_directory(parent: Path, model_id: str) -> Path:
    """A directory under ``parent`` that does not exist yet, named after the model and numbered from the second on."""
    name = Path(model_id).name or "model"
    number = 1
    while (directory := parent / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return directory


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A directory to write into, which becomes ``target`` when the block ends and vanishes when it fails.

    An older ``target`` is replaced only then.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        _write_manifest(partial)
        _to_disk(partial)
        _replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def saving(what: str, *, resumable: bool = True) -> Iterator[None]:
    """Turn every way in which writing ``what`` can fail into one error; ``resumable`` if there is a checkpoint.

    Raises:
        InputError: with the reason; a disk that is full, mostly.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # torch's writer raises RuntimeError
        raise InputError(
            f"The {what} could not be written: {error}.",
            advice="What was saved before is unchanged. Make room and continue with --resume."
            if resumable
            else "Make room and start again; with --save-steps there would be a checkpoint to go on from.",
        ) from error


def newest_whole(directory: Path) -> Path | None:
    """The newest checkpoint in ``directory`` whose files are all there in their full size, or None."""
    for _, path in reversed(checkpoints(directory)):
        if is_whole(path):
            return path
    return None


def checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Checkpoints in ``directory`` with the optimizer step of each, oldest first."""
    found = [(CHECKPOINT.fullmatch(path.name), path) for path in directory.iterdir()]
    return sorted((int(match.group(1)), path) for match, path in found if match)


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was taken, from its name."""
    match = CHECKPOINT.fullmatch(checkpoint.name)
    assert match is not None, f"{checkpoint} is no checkpoint"
    return int(match.group(1))


def keep_newest(directory: Path, count: int, *, besides: Path | None = None) -> None:
    """Delete all but the ``count`` newest checkpoints, and but ``besides``."""
    for _, path in checkpoints(directory)[:-count]:
        if path != besides:
            shutil.rmtree(path, ignore_errors=True)


def is_whole(directory: Path) -> bool:
    """Whether all files of the directory's list are there in their full size."""
    try:
        sizes = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _write_manifest(directory: Path) -> None:
    sizes = {
        str(path.relative_to(directory)): path.stat().st_size for path in sorted(directory.rglob("*")) if path.is_file()
    }
    (directory / MANIFEST).write_text(json.dumps(sizes, indent=1), encoding="utf-8")


def _to_disk(directory: Path) -> None:
    for path in (*directory.rglob("*"), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``; a directory cannot be renamed over another, so an old one steps aside first."""
    if target.exists():
        aside = target.with_name(f".{target.name}{ASIDE}")
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
        source.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        source.rename(target)

"""Records what a restructuring must not change, and compares two records.

* ``plans``: sixty plans as ``badam-plan --json`` prints them;
* ``composed``: 360 rehearsals composed to full depth: bytes, order, categories, names, work and peaks;
* ``resumed``: weights, optimizer state and metrics of runs that were continued from a checkpoint;
* ``cpu``: forty cases of the CPU's accuracy table, predicted and measured.

Both records must be made on one machine, with the same libraries: kernels differ between processors. Times, dates,
paths and what is free on the machine are left out; each part says what and why.

    python -m benchmarks.unchanged record --out before.json [--part plans] [--only TEXT]
    python -m benchmarks.unchanged compare before.json after.json [--part plans] [--only TEXT]

``record`` adds to a file that is there already, so parts can be recorded one by one. It runs two cases at a time, and
takes some ten minutes of processors in all. ``compare`` ends with 0 if the records say the same, with 1 and the first
differences if not, and with 2 if they cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.recorded import forks

PARTS = {"plans": "plans", "composed": "composed", "resumed": "resumed", "cpu": "cpu_table"}
"""Modules in benchmarks.recorded, by part."""
LIBRARIES = ("torch", "transformers", "trl", "peft")
SCALARS_BYTES = 64
"""By how much a ``measured`` figure may differ: how long Hugging Face's loop holds its scalars, of 4 to 8 bytes each,
depends on timing, so that two runs of one commit differ by 4 to 8 bytes."""
SHOWN = 20
BAD_INPUT = 2


class NotComparable(Exception):
    """Two records that say nothing about a change of the code, or a file that is no record."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Record or compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="record this tree")
    recording.add_argument("--out", type=Path, required=True, help="file to write or to add to")
    comparing = commands.add_parser("compare", help="compare two records")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    for command in (recording, comparing):
        command.add_argument("--part", choices=PARTS, action="append", help="this part only; can be repeated")
        command.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args(arguments)
    parts = options.part or list(PARTS)
    try:
        if options.command == "record":
            record(options.out, parts, options.only)
            return 0
        return compare(read(options.old), read(options.new), parts, options.only)
    except NotComparable as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except forks.CaseFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def record(path: Path, parts: Sequence[str], only: str = "") -> None:
    """Record the parts of this tree in ``path``, each as soon as it is whole; what else the file holds stays.

    Raises:
        NotComparable: if the file holds parts that were recorded in other surroundings.
    """
    around = surroundings()
    known = read(path) if path.exists() else {"surroundings": around, "parts": {}}
    if known["surroundings"] != around:
        raise NotComparable(f"{path} was recorded with {known['surroundings']}, and this is {around}; name a new file.")
    forks.import_libraries()
    for part in parts:
        begun, worked = time.monotonic(), _processor_seconds()
        cases = import_module(f"benchmarks.recorded.{PARTS[part]}").cases()
        results = forks.run_all({name: case for name, case in cases.items() if only in name})
        known["parts"][part] = {"revision": _revision(), "cases": results}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
        taken = f"{time.monotonic() - begun:.0f} s, {_processor_seconds() - worked:.0f} s of processors"
        print(f"{part}: {len(results)} cases in {taken}", file=sys.stderr, flush=True)


def _processor_seconds() -> float:
    """Of all processes that ended, which says more than the clock where other work runs beside them."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def surroundings() -> dict[str, str]:
    """What else than the code decides on the results."""
    return {"processor": _processor(), **{name: version(name) for name in LIBRARIES}}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _revision() -> str:
    """The commit of this tree, with a mark if files differ from it."""
    git = ["git", "-C", str(Path(__file__).parents[1]), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def read(path: Path) -> dict[str, Any]:
    """A record.

    Raises:
        NotComparable: if there is none.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _ = found["surroundings"], [part["cases"] for part in found["parts"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotComparable(f"{path} is no record that can be read: {error!r}.") from error
    return found


def compare(old: dict[str, Any], new: dict[str, Any], parts: Sequence[str], only: str = "") -> int:
    """Print how many cases of each part are identical, and the first differences; returns the exit code.

    Raises:
        NotComparable: if they come from other libraries or processors, or the older one lacks a part.
    """
    if old["surroundings"] != new["surroundings"]:
        raise NotComparable(f"they were recorded with {old['surroundings']} and with {new['surroundings']}.")
    if missing := [part for part in parts if not old["parts"].get(part, {}).get("cases")]:
        raise NotComparable(f"the older record has no {' and no '.join(missing)}; compare others with --part.")
    found: list[str] = []
    for part in parts:
        before, after = (each["parts"].get(part, {"revision": "nothing", "cases": {}}) for each in (old, new))
        names = [name for name in dict.fromkeys([*before["cases"], *after["cases"]]) if only in name]
        if not names:
            raise NotComparable(f"no case of {part} has {only!r} in its name.")
        differing = 0
        for name in names:
            own = list(differences(before["cases"].get(name), after["cases"].get(name), f"{part} | {name} |"))
            found += own
            differing += bool(own)
        same = f"{len(names) - differing} of {len(names)} identical"
        print(f"{part}: {same} ({before['revision']} and {after['revision']})")
    for line in found[:SHOWN]:
        print(line)
    if len(found) > SHOWN:
        print(f"and {len(found) - SHOWN} more differences")
    return 1 if found else 0


def differences(old: Any, new: Any, where: str) -> Iterator[str]:
    """One line for each value that differs, with its place; a whole branch that only one side has is one value."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            if name in old and name in new:
                yield from differences(old[name], new[name], f"{where}.{name}")
            else:
                yield f"{where}.{name}: only in the {'older' if name in old else 'newer'}"
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from differences(one, other, f"{where}[{place}]")
    elif where.endswith(".measured") and isinstance(old, int) and isinstance(new, int):
        if abs(old - new) > SCALARS_BYTES:
            yield f"{where}: {old} -> {new}"
    elif type(old) is not type(new) or old != new:
        yield f"{where}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


if __name__ == "__main__":
    sys.exit(main())

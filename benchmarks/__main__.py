"""Lists the benchmarks, or runs those that are named: ``python -m benchmarks [NAME ...] [--all]``.

Without a name nothing is measured: some take minutes, and what they write is part of the documentation.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
ALONE = (
    "cpu_accuracy",
    "backward_blocks",
    "published",
    "checkpointing_backward",
    "planning_time",
    "many_settings",
)
"""Those that need neither arguments nor another installation."""


def available() -> dict[str, str]:
    """Every benchmark that can be run by its name, with the first line of what it says of itself."""
    found = {}
    for path in sorted([*FOLDER.glob("*.py"), *FOLDER.glob("gpu/*.py")]):
        text = path.read_text(encoding="utf-8")
        name = ".".join(path.relative_to(FOLDER).with_suffix("").parts)
        if '__name__ == "__main__"' in text and not name.endswith(("__main__", "worker")):
            found[name] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return found


def main() -> None:
    """List, or run what is named."""
    known = available()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="\n".join(f"{name:24} {line}" for name, line in known.items()),
        epilog="Options of a single benchmark: python -m benchmarks.NAME --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="*", help="what to run, one after the other")
    parser.add_argument("--all", action="store_true", help=f"run {', '.join(ALONE)}")
    options = parser.parse_args()
    if unknown := [name for name in options.name if name not in known]:
        parser.error(f"there is no benchmark called {', '.join(unknown)}; known are {', '.join(known)}")
    names = [*options.name, *(name for name in ALONE if options.all and name not in options.name)]
    if not names:
        parser.print_help()
    else:
        sys.exit(max(map(run, names)))


def run(name: str) -> int:
    """Run one in a process of its own; returns its exit code."""
    print(f"benchmarks.{name}", file=sys.stderr, flush=True)
    return subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], cwd=FOLDER.parent, check=False).returncode


if __name__ == "__main__":
    main()

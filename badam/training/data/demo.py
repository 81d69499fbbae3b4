"""Training data that every machine has: the docstrings of Python's standard library.

Each function, class and module with a docstring gives one pair: its signature as prompt, its docstring as completion.
The sources are parsed, never imported. No torch.
"""

from __future__ import annotations

import ast
import json
import platform
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from badam.errors import DataError, InputError
from badam.files import cache_directory, write_file
from badam.training.data.formats import SftRow

NAME = "stdlib-docstrings"
"""The name under which ``--data`` knows this data; also its default."""

SHORTEST, LONGEST = 24, 2000
"""Docstrings outside this range of characters are left out: too little to learn, or whole manuals."""

SKIPPED_DIRECTORIES = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}

_FORMAT = 1  # raise it when the pairs change, so that files written before are made again


def stdlib_docstrings(cache: Path | None = None) -> list[SftRow]:
    """Prompt/completion pairs from this Python's standard library, in the order of its files.

    Args:
        cache: directory where the pairs are kept for the next time; by default the user's cache directory. One that
            cannot be written is no error.

    Raises:
        DataError: if this Python comes without the sources of its library.
    """
    path = (
        cache or cache_directory()
    ) / f"{NAME}-{_FORMAT}-{platform.python_implementation()}-{platform.python_version()}.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        pass
    pairs = list(docstring_pairs(Path(sysconfig.get_path("stdlib"))))
    if not pairs:
        raise DataError(
            f"This Python has no sources of its standard library in {sysconfig.get_path('stdlib')}.",
            advice="Give training data of your own with --data.",
        )
    _keep(pairs, path)
    return pairs


def docstring_pairs(root: Path) -> Iterator[SftRow]:
    """The pairs of every Python file under ``root``, by path; files that do not parse are passed over."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_DIRECTORIES.isdisjoint(parts):
            try:
                tree = ast.parse(path.read_bytes())
            except (OSError, SyntaxError, ValueError):
                continue
            module = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
            yield from _pairs_of(tree, module)


def _pairs_of(tree: ast.Module, module: str) -> Iterator[SftRow]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            docstring = (ast.get_docstring(node) or "").strip()
            if SHORTEST <= len(docstring) <= LONGEST:
                yield {"prompt": f"# {module}\n{_signature(node, module)}\n", "completion": docstring}


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module, module: str) -> str:
    if isinstance(node, ast.Module):
        return f"module {module}:"
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    return f"def {node.name}({ast.unparse(node.args)}):"


def _keep(pairs: list[SftRow], path: Path) -> None:
    with suppress(InputError):  # it is found again the next time
        write_file(path, "".join(json.dumps(pair) + "\n" for pair in pairs), parents=True)

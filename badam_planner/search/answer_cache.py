"""Answers of badam-plan that were given before, in the user's cache directory. Loads no torch.

An answer is found again by everything that it depends on: the model's configuration, the target, the options, the
versions of what was rehearsed, and the planner's own source files. So nothing needs to be told that it is stale.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

import badam
import badam_planner
from badam.errors import DoesNotFit, InputError
from badam.files import cache_directory, write_file
from badam.plan import Plan
from badam_planner.search.result import Answer, SearchResult

REHEARSED = ("torch", "transformers")
KEPT_ANSWERS = 500
"""Files beyond which the oldest are removed; one is some 20 to 200 kB."""


def answer_key(question: Mapping[str, Any]) -> str:
    """A name for the answer to ``question``, a mapping of plain values that says all that was asked."""
    content = {
        "question": question,
        "versions": {name: version(name) for name in REHEARSED},
        "sources": _sources_digest(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


def load_answer(key: str) -> Answer | None:
    """The answer called ``key``; None if there is none, or none that can be read."""
    try:
        content = json.loads(_path(key).read_text(encoding="utf-8"))
        refusal = content["refusal"]
        return Answer(
            result=_RESULT.validate_python(content["result"], strict=False),
            plan=None if content["plan"] is None else Plan.model_validate(content["plan"]),
            refusal=None if refusal is None else DoesNotFit(refusal[0], advice=refusal[1]),
        )
    except (OSError, InputError, ValueError, KeyError, TypeError, ValidationError):
        return None  # written by hand, cut off or never there: it is found out again and rewritten


def save_answer(key: str, answer: Answer) -> None:
    """Keep an answer, whole or not at all. A cache that cannot be written is no reason to fail."""
    refusal = answer.refusal
    content = {
        "result": _RESULT.dump_python(answer.result, mode="json"),
        "plan": None if answer.plan is None else answer.plan.model_dump(mode="json"),
        "refusal": None if refusal is None else [refusal.message, refusal.advice],
    }
    path = _path(key)
    with suppress(OSError, InputError):
        write_file(path, json.dumps(content), parents=True)
        _remove_oldest(path.parent)


_RESULT = TypeAdapter(SearchResult)


def _path(key: str) -> Path:
    return cache_directory() / "answers" / f"{key}.json"


def _remove_oldest(directory: Path) -> None:
    files = sorted(directory.glob("*.json"), key=lambda file: file.stat().st_mtime)
    for file in files[:-KEPT_ANSWERS]:
        file.unlink(missing_ok=True)


@cache
def _sources_digest() -> str:
    """Changes whenever a source file of runtime or planner does: an editable install keeps its version."""
    digest = hashlib.sha256()
    for package in (badam, badam_planner):
        root = Path(str(package.__file__)).parent
        for file in sorted(root.rglob("*.py")):
            status = file.stat()
            digest.update(f"{file.relative_to(root)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()

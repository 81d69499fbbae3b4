"""From a question to its answer: one that was given before, from the user's cache directory, or a new one.

Only a new one loads torch. An answer is found again by everything that it depends on: the question, the model's
configuration, the target, the versions of what was rehearsed, and the planner's own source files. So nothing needs to
be told that it is stale.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from badam.errors import DoesNotFit, InputError
from badam.files import cache_directory, write_file
from badam.plan import Plan, Target
from badam.vocabulary import ModelSource
from badam_planner.accuracy.calibration import calibrated
from badam_planner.search.question import Question, check_gpus
from badam_planner.search.result import Answer, SearchResult
from badam_planner.sources.calibration_store import load_calibration
from badam_planner.sources.model_source import find_config, notes_on
from badam_planner.sources.target import find_target

REHEARSED = ("torch", "transformers")
KEPT_ANSWERS = 500
"""Files beyond which the oldest are removed; one is some 20 to 200 kB."""


def answer(
    question: Question,
    *,
    source: tuple[str, ModelSource, dict[str, Any]] | None = None,
    command: str = "",
    progress: Callable[[str], None] = lambda _text: None,
    tell: Callable[[str], None] = lambda _text: None,
) -> Answer:
    """What fits, and the plan to recommend.

    Args:
        question: what is asked.
        source: id, kind and configuration of its model, where they need not be looked up.
        command: for the record of the plan.
        progress: is told what is being done.
        tell: is told what the figures of the device rest on, if on more than the catalogue.

    Raises:
        InputError: if model or device cannot be found, or do not go with what is asked.
    """
    check_gpus(question)
    progress(f"reading {question.model}")
    target = target_of(question, tell)
    source = source or find_config(question.model)
    key = answer_key(question, source, target)
    found = load_answer(key)
    if found is None:
        from badam_planner.rehearsal.workers import available_workers
        from badam_planner.search.planner import make_plan
        from badam_planner.search.request import request_for

        found = make_plan(request_for(question, source, target, command), progress, workers=available_workers())
        save_answer(key, found)
    elif found.plan is not None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        provenance = found.plan.provenance.model_copy(update={"command": command, "date": now})
        found = replace(found, plan=found.plan.model_copy(update={"provenance": provenance}))
    name, _, config = source
    return replace(found, notes=(*notes_on(name, config, question.dtype), *found.notes))


def target_of(question: Question, tell: Callable[[str], None] = lambda _text: None) -> Target:
    """The device of a question, with what runs measured on it have taught, if there were any."""
    number, size = question.num_gpus, question.shard_size
    target = find_target(question.gpu, question.gpu_memory_bytes)
    calibration = load_calibration(target.gpu)
    if calibration is not None:
        tell(calibration.sentence())
        target = calibrated(target, calibration)
    return target.model_copy(
        update={
            "engine": question.engine,
            "num_gpus": 1 if number == "auto" else number,
            "shard_size": None if size in ("auto", number) else size,
            "gpus_per_node": question.gpus_per_node,
            "offload": question.offload,
        }
    )


def answer_key(question: Question, source: tuple[str, ModelSource, dict[str, Any]], target: Target) -> str:
    """A name for the answer to a question about the model and the device that were found for it."""
    content = {
        "question": _QUESTION.dump_python(question, mode="json"),
        "model": source,
        "target": target.model_dump(mode="json"),
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
            notes=_NOTES.validate_python(content["notes"]),
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
        "notes": answer.notes,
    }
    path = _path(key)
    with suppress(OSError, InputError):
        write_file(path, json.dumps(content), parents=True)
        _remove_oldest(path.parent)


_RESULT = TypeAdapter(SearchResult)
_NOTES = TypeAdapter(tuple[str, ...])
_QUESTION = TypeAdapter(Question)


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
    for package in ("badam", "badam_planner"):
        root = Path(str(files(package)))
        for file in sorted(root.rglob("*.py")):
            status = file.stat()
            digest.update(f"{file.relative_to(root)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()

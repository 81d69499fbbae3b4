"""From what the user typed as MODEL to a model specification: catalogue name, Hub id, directory or config.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from badam.errors import BadamError, InputError, in_one_line, near_matches
from badam.plan import ModelSpec, config_digest
from badam.vocabulary import ModelSource, Task
from badam_planner.sources import catalogue

CONFIG_FILE = "config.json"


def find_config(name: str) -> tuple[str, ModelSource, dict[str, Any]]:
    """The id, the kind of source and the raw configuration of the model that ``name`` means.

    A path that exists wins over the catalogue, the catalogue over the Hub, so that a catalogued model needs no
    network.

    Raises:
        InputError: if nothing by that name can be read; lists near matches.
    """
    path = Path(name)
    if _exists(path, Path.is_dir):
        return str(path), "directory", _read_config(path / CONFIG_FILE)
    if path.suffix == ".json" or _exists(path, Path.is_file):
        return str(path), "config", _read_config(path)
    try:
        record = catalogue.find_model(name)
    except InputError as unknown:
        if name.count("/") != 1 or name.startswith((".", "/")):
            raise unknown
        return name, "hub", _fetch_config(name)
    return record.id, "catalogue", dict(record.config)


def describe_model(name: str, **changes: Any) -> ModelSpec:
    """The specification of the model that ``name`` means; its parameters are counted on its module tree.

    Args:
        name: what to look up.
        changes: ``task`` and ``labels``, see :func:`specify`.

    Raises:
        InputError: as :func:`find_config`, and if transformers cannot build the model.
    """
    return specify(*find_config(name), **changes)


def specify(
    model_id: str, source: ModelSource, config: dict[str, Any], *, task: Task | None = None, labels: int | None = None
) -> ModelSpec:
    """The specification of a model whose configuration was found; loads torch to count its parameters.

    Args:
        model_id, source, config: as :func:`find_config` returns them.
        task: what to train the model for; None is what its configuration says.
        labels: classes to tell apart; None leaves the configuration's, which are two if it names none.

    Raises:
        InputError: if transformers cannot build the model, or classes are given for another task.
    """
    from badam.training.tasks import CLASSIFICATIONS, TASKS, default_task

    task = task or default_task(config)
    if labels is not None:
        if task not in CLASSIFICATIONS:
            raise InputError(
                f"{model_id} is planned for {TASKS[task].words}, which has no {labels} classes.",
                advice="Add --task sequence-classification.",
            )
        named = ("id2label", "label2id")
        config = {**{key: value for key, value in config.items() if key not in named}, "num_labels": labels}
    spec = ModelSpec(
        id=model_id,
        source=source,
        config=config,
        config_digest=config_digest(config),
        task=task,
        parameters=1,
    )
    with explaining(model_id):
        return spec.model_copy(update={"parameters": count_parameters(spec)})


@contextmanager
def explaining(model_id: str) -> Iterator[None]:
    """Turn what a model's own code raises into a sentence: its configuration, or the size asked for, is at fault.

    Raises:
        InputError: in place of any exception that is not already one of ours.
    """
    try:
        yield
    except BadamError:
        raise
    except Exception as error:  # a model may refuse its facts with any error there is
        raise InputError(
            f"The code of {model_id} fails with this configuration and this request: {in_one_line(error)}",
            advice="BADAM_TRACEBACK=1 in the environment shows where.",
        ) from error


def count_parameters(spec: ModelSpec) -> int:
    """Entries of all distinct parameters of the model's module tree; tied ones count once."""
    from badam.training.build import choose_attention
    from badam_planner.rehearsal.model_tree import inspect_model

    return inspect_model(spec, choose_attention(spec)).entries


def _exists(path: Path, as_what: Callable[[Path], bool]) -> bool:
    """Whether ``path`` is there; a name that no path can have, or that may not be looked up, is none."""
    try:
        return as_what(path)
    except OSError:
        return False


def _read_config(path: Path) -> dict[str, Any]:
    advice = "Give a directory with a config.json, a config.json, a catalogue name or a Hub id."
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=_special_float)
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror or error}.", advice=advice) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}.", advice=advice) from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise InputError(f"{path} has no model_type, so it is not a model configuration.", advice=advice)
    return content


def _special_float(entry: dict[str, Any]) -> Any:
    """transformers writes an infinite number as ``{"__float__": "Infinity"}``."""
    return float(entry["__float__"]) if entry.keys() == {"__float__"} else entry


def _fetch_config(hub_id: str) -> dict[str, Any]:
    """The configuration of a model on the Hub, from this machine's cache if it is there.

    Only the JSON file is read: code that comes with a model is not run.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(hub_id, CONFIG_FILE)
        if not isinstance(cached, str):
            # A download tries again for half a minute where there is no network; this question is asked once.
            get_hf_file_metadata(hf_hub_url(hub_id, CONFIG_FILE))
            cached = hf_hub_download(hub_id, CONFIG_FILE)
    except Exception as error:  # the classes of the library and of its HTTP client change between releases
        close = near_matches(hub_id, [record.id for record in catalogue.models()])
        known = f"Catalogued and close: {', '.join(close)}. " if close else ""
        raise InputError(
            f"The model {hub_id} is not in the catalogue and its configuration cannot be fetched: {in_one_line(error)}",
            advice=f"{known}A local directory or config.json works without network.",
        ) from error
    return _read_config(Path(cached))

"""From what the user typed as MODEL to a configuration: catalogue name, Hub id, directory or config.json. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from badam.errors import InputError, in_one_line, near_matches
from badam.training.weights import stored_quantized
from badam.vocabulary import Dtype, ModelSource
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


def notes_on(name: str, config: Mapping[str, Any], dtype: Dtype) -> tuple[str, ...]:
    """What a configuration says of its checkpoint that a plan leaves out, in sentences.

    Args:
        name: of the model.
        config: as :func:`find_config` returns it.
        dtype: of the plan.
    """
    notes = []
    if form := stored_quantized(config):
        notes.append(
            f"The checkpoint of {name} is stored quantized ({form}). Planned is training with its weights in {dtype}, "
            "for which they have to be dequantized first."
        )
    if own := config.get("auto_map"):
        code = ", ".join(dict.fromkeys(map(str, own.values()))) if isinstance(own, Mapping) else str(own)
        notes.append(
            f"{name} comes with its own code ({code}), which is not run. Planned is what transformers builds for the "
            f"model type {config.get('model_type')!r}; the two may differ."
        )
    return tuple(notes)


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

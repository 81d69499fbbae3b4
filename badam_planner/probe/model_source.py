"""From what the user typed as MODEL to a model specification: catalogue name, Hub id, directory or config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from badam.errors import InputError, near_matches
from badam.plan import ModelSpec, config_digest
from badam_planner.probe import catalogue

Source = Literal["catalogue", "hub", "directory", "config"]

CONFIG_FILE = "config.json"


def find_config(name: str) -> tuple[str, Source, dict[str, Any]]:
    """The id, the kind of source and the raw configuration of the model that ``name`` means.

    A path that exists wins over the catalogue, the catalogue over the Hub, so that a catalogued model needs no
    network.

    Raises:
        InputError: if nothing by that name can be read; lists near matches.
    """
    path = Path(name)
    if path.is_dir():
        return str(path), "directory", _read_config(path / CONFIG_FILE)
    if path.suffix == ".json" or path.is_file():
        return str(path), "config", _read_config(path)
    try:
        record = catalogue.find_model(name)
    except InputError as unknown:
        if name.count("/") != 1 or name.startswith((".", "/")):
            raise unknown
        return name, "hub", _fetch_config(name)
    return record.id, "catalogue", dict(record.config)


def describe_model(name: str) -> ModelSpec:
    """The specification of the model that ``name`` means; its parameters are counted on its module tree.

    Raises:
        InputError: as :func:`find_config`, and if transformers cannot build the model.
    """
    model_id, source, config = find_config(name)
    spec = ModelSpec(
        id=model_id,
        source=source,
        config=config,
        config_digest=config_digest(config),
        task=_task(config),
        parameters=1,
    )
    return spec.model_copy(update={"parameters": count_parameters(spec)})


def count_parameters(spec: ModelSpec) -> int:
    """Entries of all distinct parameters of the model's module tree; tied ones count once."""
    from badam.plan import Training
    from badam.training.assemble import choose_attention
    from badam_planner.probe.rehearse import fake_model, fake_world

    with fake_world():
        model = fake_model(spec, Training(batch_size=1, seq_len=1, attention=choose_attention(spec)))
        return sum(parameter.numel() for parameter in model.parameters())


def _task(config: dict[str, Any]) -> Literal["causal-lm", "sequence-classification"]:
    """Encoders are fine-tuned for classification, everything that generates is a language model."""
    architectures = config.get("architectures") or []
    encoder = any(name.endswith(("ForMaskedLM", "ForPreTraining", "SequenceClassification")) for name in architectures)
    return "sequence-classification" if encoder else "causal-lm"


def _read_config(path: Path) -> dict[str, Any]:
    advice = "Give a directory with a config.json, a config.json, a catalogue name or a Hub id."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror or error}.", advice=advice) from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}.", advice=advice) from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise InputError(f"{path} has no model_type, so it is no model configuration.", advice=advice)
    return content


def _fetch_config(hub_id: str) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        return dict(AutoConfig.from_pretrained(hub_id).to_dict())
    except (OSError, ValueError) as error:
        close = near_matches(hub_id, [record.id for record in catalogue.models()])
        known = f"Catalogued and close: {', '.join(close)}." if close else "badam-plan --list-models shows what is known."
        reason = str(error).splitlines()[0]
        raise InputError(
            f"The model {hub_id} is not in the catalogue and its configuration cannot be fetched: {reason}",
            advice=f"{known} A local directory or config.json works without network.",
        ) from error

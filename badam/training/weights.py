"""Where the weights and the tokenizer of a run come from."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from badam.errors import InputError
from badam.plan import ModelSpec

PRETRAINED, RANDOM = "pretrained", "random"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NAMES_SHOWN = 4

OWN_NAMESPACE = "badam/"
"""Catalogued models under this name exist as configurations only, for trying things out."""

_QUANTIZATION = "quantization_config"

CONNECT_SECONDS = 5.0
"""How long to wait for the Hub before taking this machine for one without network."""

ADAPTER_CONFIG = "adapter_config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def locate_weights(spec: ModelSpec, init: str) -> str | None:
    """The Hub id or directory to load a plan's model from; None to initialize it at random.

    Args:
        spec: the plan's model.
        init: ``pretrained`` for where the plan's model came from, ``random``, or a directory with safetensors files.

    Raises:
        InputError: if there are no weights there, or the Hub does not give them.
    """
    if init == RANDOM or (init == PRETRAINED and spec.id.startswith(OWN_NAMESPACE)):
        return None
    if init != PRETRAINED:
        return _checked_directory(Path(init), spec)
    if spec.source == "directory":
        return _checked_directory(Path(spec.id), spec)
    if spec.source == "config":
        raise InputError(
            f"The plan was made from the configuration {spec.id}, which has no weights.",
            advice="Start from random weights with --init random, or name a local directory: --init DIR.",
        )
    _check_plain(spec.id, Path(_check_hub(spec.id)))
    return spec.id


def saved_files(directory: Path) -> list[Path]:
    """The safetensors files that make up the weights in ``directory``.

    Raises:
        InputError: if one of them is not there.
    """
    if not (directory / INDEX).is_file():
        files = [directory / WEIGHTS]
    else:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        files = [directory / name for name in sorted(set(index["weight_map"].values()))]
    absent = [path.name for path in files if not path.is_file()]
    if absent:
        raise InputError(
            f"The weights in {directory} are not complete: {shown(absent)} of {len(files)} files "
            f"{'is' if len(absent) == 1 else 'are'} not there.",
            advice="Copy or download what is missing.",
        )
    return files


def shown(names: Iterable[str]) -> str:
    """The first few of some names, and how many more there are."""
    ordered = sorted(names)
    more = len(ordered) - NAMES_SHOWN
    return ", ".join(ordered[:NAMES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def stored_quantized(config: Mapping[str, Any]) -> str | None:
    """In which form a checkpoint keeps weights that are not plain numbers, such as ``FP8`` or ``GPTQ, 4 bits``.

    Args:
        config: of the checkpoint, as its ``config.json`` has it.
    """
    found = next((part[_QUANTIZATION] for part in _parts(config) if isinstance(part.get(_QUANTIZATION), Mapping)), None)
    if found is None:
        return None
    method = str(found.get("quant_method") or "bitsandbytes")
    name = method.upper() if method in ("fp8", "awq", "gptq", "mxfp4") else method
    bits = next((size for size in (4, 8) if found.get(f"load_in_{size}bit")), found.get("bits"))
    return f"{name}, {bits} bits" if isinstance(bits, int) else name


def unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the same model with plain weights, which are what can be trained."""
    return {
        name: unquantized(value) if isinstance(value, Mapping) and name.endswith("_config") else value
        for name, value in config.items()
        if name != _QUANTIZATION
    }


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The configuration and those nested in it, of a text part for example."""
    yield config
    for name, value in config.items():
        if isinstance(value, Mapping) and name.endswith("_config"):
            yield value


def _check_plain(where: str, config_file: Path) -> None:
    """Refuse weights that are stored quantized: they would be read as what they are not, or cannot be trained."""
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # the weights are checked by their names and shapes; this is only about what a configuration says
    form = stored_quantized(config) if isinstance(config, dict) else None
    if form is not None:
        raise InputError(
            f"The weights of {where} are stored quantized ({form}); training needs plain ones.",
            advice="Load them with transformers, call model.dequantize() where it has that, save_pretrained to a "
            "directory, and name it: --init DIR. Or start from a checkpoint in 16 bits.",
        )


def tokenizer_source(spec: ModelSpec, weights: str | None) -> str | None:
    """Where to load the tokenizer from; None to train one, where random weights give tokens no meaning anyway."""
    if weights is not None:
        return weights
    directory = Path(spec.id)
    if spec.source == "directory" and any((directory / name).exists() for name in _TOKENIZER_FILES):
        return spec.id
    return None


def _checked_directory(directory: Path, spec: ModelSpec) -> str:
    if not directory.is_dir():
        raise InputError(
            f"There is no directory {directory} to load weights from.",
            advice=f"--init takes {PRETRAINED}, {RANDOM} or a directory with safetensors files.",
        )
    if (directory / ADAPTER_CONFIG).is_file():
        raise InputError(
            f"The directory {directory} holds an adapter of PEFT, not the weights of a model.",
            advice="Merge the adapter into its model first (merge_and_unload), and save that.",
        )
    if not any(directory.glob("*.safetensors")):
        raise InputError(
            f"The directory {directory} has no safetensors file.",
            advice="Convert the weights to safetensors, or start from random ones with --init random.",
        )
    if (directory / INDEX).is_file() or (directory / WEIGHTS).is_file():
        saved_files(directory)
    _check_plain(str(directory), directory / "config.json")
    _check_type(directory, spec)
    return str(directory)


def _check_type(directory: Path, spec: ModelSpec) -> None:
    """Refuse weights that say of themselves that they are of another kind of model; similar ones share all names."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # the names of the tensors will tell
    theirs, planned = _model_types(config), _model_types(spec.config)
    if theirs and planned and not theirs & planned:
        raise InputError(
            f"The weights in {directory} are those of a {config['model_type']} model, and the plan is for a "
            f"{spec.config['model_type']} model.",
            advice="Plan for the model that the weights belong to, or name other weights with --init.",
        )


def _model_types(config: Mapping[str, Any]) -> set[str]:
    """The type of a model, and of the language model inside it."""
    text = config.get("text_config")
    found = (config.get("model_type"), text.get("model_type") if isinstance(text, Mapping) else None)
    return {kind for kind in found if isinstance(kind, str)}


def _check_hub(name: str) -> str:
    """Ask for the smallest file first, so that a missing token or network is known in seconds; returns its path."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    if not _is_reachable(constants.ENDPOINT):
        # The library would try every file for a minute before it looks into its cache.
        constants.HF_HUB_OFFLINE = True
    advice = f"Start from random weights with --init {RANDOM}, or name a local directory with them: --init DIR."
    try:
        return str(hf_hub_download(name, "config.json"))
    except GatedRepoError as error:
        raise InputError(
            f"The weights of {name} are gated: the Hub asks for a token with access to them.",
            advice=f"Accept the licence on its page and log in with: hf auth login. {advice}",
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(f"The Hub has no public model {name}.", advice=advice) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise InputError(
            f"The weights of {name} are not in the local cache, and the Hub cannot be reached.", advice=advice
        ) from error


def _is_reachable(endpoint: str) -> bool:
    """Whether a connection can be opened; where a proxy does that, it is believed."""
    address = urlsplit(endpoint)
    if getproxies().get(address.scheme):
        return True
    try:
        with socket.create_connection((address.hostname, address.port or 443), timeout=CONNECT_SECONDS):
            return True
    except OSError:
        return False

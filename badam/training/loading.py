"""Reading weights under the names that they were saved by, and refusing those that leave the model as it was.

For a third of all language models these are not the names of the module tree: fused experts are saved one by one, a
nested text model without its prefix. ``from_pretrained`` maps them; ``load_state_dict(strict=False)`` passes over them
without a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from badam.errors import InputError
from badam.training.tasks import CLASSIFICATIONS
from badam.training.weights import saved_files, shown
from badam.vocabulary import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WRAPPERS = {r"^module\.": "DistributedDataParallel", r"_orig_mod(?:ule)?\.": "torch.compile"}
"""What a wrapper puts into the names of what it wraps, as regular expressions."""

Loaded = tuple["PreTrainedModel", Mapping[str, Any]]
"""A model, and what transformers tells of its loading: ``missing_keys``, ``unexpected_keys`` and others."""


def load_pretrained(
    load: Callable[..., Loaded], weights: str, task: Task, tell: Callable[[str], None]
) -> PreTrainedModel:
    """The model that ``load`` makes of a checkpoint, if the checkpoint is one of such a model.

    Args:
        load: a ``from_pretrained`` with ``output_loading_info``, which takes a ``key_mapping``.
        weights: where from, for messages.
        task: the head of a classification may be new.
        tell: told of what is new, of what is not used, and of names that were changed.

    Raises:
        InputError: if tensors are missing that the checkpoint should have; names them.
    """
    model, info = load()
    _refuse_adapters(model, weights)
    wrapped = _wrappers_of(info["unexpected_keys"])
    if info["missing_keys"] and wrapped:
        del model
        model, info = load(key_mapping=dict.fromkeys(wrapped, ""))
        mine = set(wrapped)
        used: list[Any] = getattr(model, "_weight_conversions", None) or []
        # Or the names would be saved with what was left out.
        model._weight_conversions = [one for one in used if not mine & {*one.source_patterns}]
        tell(f"note: the tensors in {weights} have names of {' and '.join(wrapped.values())}, which were taken off")
    missing, unused = set(info["missing_keys"]), set(info["unexpected_keys"])
    new = {name for name in missing if task in CLASSIFICATIONS and _is_of_the_task(name, model)}
    if missing - new:
        _refuse(model, missing - new, unused, weights)
    if new:
        tell(f"note: {weights} does not hold {shown(new)}: new, with random weights")
    if unused:
        tell(f"note: of {weights} the model has no use for {shown(unused)}")
    return model


def _wrappers_of(names: Iterable[str]) -> dict[str, str]:
    """Those of :data:`WRAPPERS` that ``names`` bear the mark of."""
    unknown = list(names)
    return {mark: wrapper for mark, wrapper in WRAPPERS.items() if any(re.search(mark, name) for name in unknown)}


def _is_of_the_task(name: str, model: PreTrainedModel) -> bool:
    """Whether a tensor belongs to what is put upon a base model: its head, or the pooler before it."""
    first, *rest = name.split(".")
    return first != model.base_model_prefix or "pooler" in rest


def _refuse_adapters(model: PreTrainedModel, weights: str) -> None:
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(
            f"{weights} is an adapter of PEFT beside other weights.", advice="Merge it into them first, and save both."
        )


def _refuse(model: PreTrainedModel, missing: set[str], unused: set[str], weights: str) -> None:
    has = f"; it has {shown(unused)} instead" if unused else ""
    raise InputError(
        f"{weights} does not hold the weights of the plan's model: {len(missing):,} of {len(model.state_dict()):,} "
        f"tensors are missing ({shown(missing)}){has}.",
        advice="Plan for the model that the weights belong to, or start from random ones with --init random.",
    )


class _Place(NamedTuple):
    """Where a tensor of a model's state hangs."""

    owner: nn.Module
    name: str
    tensor: Tensor

    def put(self) -> None:
        """Hang the tensor there, with the contents of the one that was put in its place."""
        found = getattr(self.owner, self.name)
        if found is not self.tensor:
            with torch.no_grad():
                self.tensor.copy_(found)
        kind: dict[str, Any] = self.owner._parameters if self.name in self.owner._parameters else self.owner._buffers
        kind[self.name] = self.tensor


def load_saved_weights(model: PreTrainedModel, directory: Path) -> None:
    """Copy the weights that ``save_pretrained`` wrote of a model like this one into its own tensors.

    Args:
        model: with the modules that it had when it was saved. Its parameters stay the same objects.
        directory: with safetensors files.

    Raises:
        InputError: if not every tensor of the model's state is there in its shape; names those that are not.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    places = list(_places(model))
    written_as = getattr(model, "_weight_conversions", None)  # replaced by those that this reading has used
    settings = LoadStateDictConfig(
        device_map={"": torch.device("cpu")}, weight_mapping=get_model_conversion_mapping(model)
    )
    with ExitStack() as stack:
        slices = _open(saved_files(directory), stack)
        try:
            info, _ = convert_and_load_state_dict_in_model(model, slices, settings)
        finally:
            for place in places:
                place.put()
            model._weight_conversions = written_as
    absent = {*info.missing_keys, *(name for name, *_ in info.mismatched_keys)}
    _check_complete(model, absent, directory)


def _places(model: nn.Module) -> Iterator[_Place]:
    """Every place of a model's state; tensors that are tied have several."""
    for owner in model.modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None and name not in owner._non_persistent_buffers_set:
                yield _Place(owner, name, tensor)


def _open(files: Iterable[Path], stack: ExitStack) -> dict[str, Any]:
    """What is in the files by name, to be read when it is asked for."""
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for path in files:
        file = stack.enter_context(safe_open(str(path), framework="pt", device="cpu"))
        found.update((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118 - it is no mapping
    return found


def _check_complete(model: PreTrainedModel, absent: set[str], directory: Path) -> None:
    """Refuse what was not found, but for names of tensors that were found under another one."""
    state = model.state_dict(keep_vars=True)
    found = {id(tensor) for name, tensor in state.items() if name not in absent}
    lacking = [name for name in absent if id(state[name]) not in found]
    if lacking:
        raise InputError(
            f"The weights in {directory} are not those of the plan's model: {len(lacking):,} of {len(state):,} tensors "
            f"are not there ({shown(lacking)}).",
            advice="Resume with the plan and the libraries that the run was begun with.",
        )

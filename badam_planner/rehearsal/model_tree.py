"""What planning needs to know of a model's module tree."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from badam.blocks.names import belongs, enclosing
from badam.blocks.partition import ParameterInfo, layer_stacks
from badam.plan import ModelSpec, Plan, Training
from badam.vocabulary import Attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPORTED_VERSIONS = ("badam", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class ModelTree:
    """What the planner needs of a module tree: names, shapes and places; no modules."""

    parameters: tuple[ParameterInfo, ...]  # distinct parameters that can be trained, in model order
    layers: tuple[str, ...]  # module paths of the layers, in order of execution
    layer_kinds: dict[str, Hashable]  # equal for layers that may stand for each other
    layer_classes: tuple[type[Any], ...]  # of the layers
    ends: tuple[str, ...]  # paths of embedding and output projection, as far as they have parameters of their own
    head_module: str  # path of the output projection; "" if there is none
    can_chunk: bool  # whether the chunked loss knows this model
    entries: int  # of all distinct parameters, those beside the text included
    versions: dict[str, str]

    def layer_of(self, path: str) -> str:
        """The layer that a module or parameter lies in, or "" if it is in none."""
        return enclosing(path, self.layer_kinds)

    def embeds_among(self, prefixes: Iterable[str]) -> bool:
        """Whether one of ``prefixes`` holds a parameter that comes before every layer."""
        for info in self.parameters:
            if self.layer_of(info.name):
                return False
            if belongs(info.name, prefixes):
                return True
        return False


_KNOWN: dict[tuple[str, str, Attention], ModelTree] = {}


def inspect_model(spec: ModelSpec, attention: Attention) -> ModelTree:
    """Build the module tree on fake tensors, once for a configuration, and note what planning needs of it."""
    key = (spec.config_digest, spec.task, attention)
    if key not in _KNOWN:
        _KNOWN[key] = _inspected(spec, attention)
    return _KNOWN[key]


def _inspected(spec: ModelSpec, attention: Attention) -> ModelTree:
    from badam.errors import InputError
    from badam.training.losses import check_chunked
    from badam.training.methods.lisa import ends_of
    from badam_planner.rehearsal.rehearse import fake_model, fake_world

    with fake_world():
        model = fake_model(spec, Training(batch_size=1, seq_len=1, attention=attention))
        entries = sum(parameter.numel() for parameter in model.parameters())
        beside = _beside_the_text(model)
        parameters = tuple(
            ParameterInfo(name, tuple(tensor.shape))
            for name, tensor in model.named_parameters()
            if tensor.requires_grad and not belongs(name, beside)
        )
        stacks = layer_stacks([info.name for info in parameters])
        kinds: dict[str, Hashable] = {}
        types = getattr(model.config.get_text_config(), "layer_types", None) or ()
        for stack in stacks:
            for position, path in enumerate(stack):
                layer = model.get_submodule(path)
                shapes = tuple((name, tuple(tensor.shape)) for name, tensor in layer.named_parameters())
                kind = types[position] if position < len(types) else None
                # A decoder's first layer has nothing below it to give gradients to but the encoder, whose gradient
                # all of its layers add up: it is the one that hands it over.
                hands_over = position == 0 and stack is not stacks[0] and bool(model.config.is_encoder_decoder)
                kinds[path] = (path.rpartition(".")[0], type(layer).__name__, kind, hands_over, shapes)
        head = model.get_output_embeddings()
        ends = tuple(ends_of(model))
        names = {id(module): name for name, module in model.named_modules()}
        try:
            check_chunked(model)
            can_chunk = True
        except InputError:
            can_chunk = False
    return ModelTree(
        parameters=parameters,
        layers=tuple(path for stack in stacks for path in stack),
        layer_kinds=kinds,
        layer_classes=tuple(type(model.get_submodule(path)) for stack in stacks for path in stack),
        ends=ends,
        head_module=names.get(id(head), ""),
        can_chunk=can_chunk,
        entries=entries,
        versions={name: version(name) for name in REPORTED_VERSIONS},
    )


def unquantized_weights(plan: Plan, tree: ModelTree) -> dict[str, int]:
    """Entries of the matrices in layers that a method which quantizes leaves as they are, by name within a layer."""
    from badam.training.build import prepare_model
    from badam.training.methods import method_of
    from badam_planner.rehearsal.rehearse import fake_model, fake_world

    matrices = {info.name: math.prod(info.shape) for info in tree.parameters if len(info.shape) > 1}
    with fake_world():
        model = fake_model(plan.model, plan.training)
        prepare_model(model, plan)
        # An adapter makes the layer that it adapts a child of its own.
        quantized = {name.replace(".base_layer.", ".") for name in method_of(plan.method).quantized_entries(model)}
    left: Counter[str] = Counter()
    for name, entries in matrices.items():
        layer = tree.layer_of(name)
        if layer and name not in quantized:
            left[name.removeprefix(f"{layer}.")] += entries
    return dict(left.most_common())


def _beside_the_text(model: PreTrainedModel) -> tuple[str, ...]:
    """Paths of the modules that a batch of text does not pass through: towers for images or sound, their projectors."""
    if model.config.get_text_config() is model.config:
        return ()
    names = {id(module): name for name, module in model.named_modules()}
    used = [names.get(id(module), "") for module in (model.get_decoder(), model.get_output_embeddings())]
    around = {path.rpartition(".")[0] for path in used if path}
    return tuple(
        name
        for name, _ in model.named_modules()
        if name and name.rpartition(".")[0] in around and not any(belongs(path, (name,)) for path in used if path)
    )

"""Build a model with only some of its layers, as fast as if it had no others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

from torch import nn

from badam.blocks.names import enclosing

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Value = TypeVar("Value")


def build_without(
    build: Callable[[], ModuleT], layers: Sequence[str], classes: Sequence[type[nn.Module]], left_out: Collection[str]
) -> ModuleT:
    """The model that ``build`` makes, less the layers ``left_out``; the others keep their names.

    The layers left out are not built where that can be had, else they are built and thrown away.

    Args:
        build: makes the whole model.
        layers: module paths of all layers, in the order of the module tree.
        classes: the class of each.
        left_out: layers whose containers forward runs through, so that it passes by what is not there.
    """
    if not left_out:
        return build()
    try:
        with _hollow(layers, classes, frozenset(left_out)):
            model = build()
        as_wanted = all(_is_hollow(model.get_submodule(path)) == (path in left_out) for path in layers)
    except Exception:  # whatever a model's code says of layers that have nothing in them
        as_wanted = False
    if not as_wanted:
        model = build()
    for path in left_out:
        container, _, index = path.rpartition(".")
        del model.get_submodule(container)._modules[index]
    return model


def with_left_out(
    named: Iterable[tuple[str, Value]], layers: Sequence[str], without: Mapping[str, str]
) -> Iterator[tuple[str, Value, bool]]:
    """Tensors, or what else parameters have, by name as the whole model has them, in its order: (name, tensor,
    whether it is there).

    In the place of one that is not there comes that of the equal layer.

    Args:
        named: tensors by parameter of a model from :func:`build_without`.
        layers: module paths of all layers, in order.
        without: the layers left out, each with an equal one that is there.
    """
    entries = list(named)
    own: dict[str, list[tuple[str, Value]]] = {layer: [] for layer in layers}
    last: dict[str, int] = {}  # by layer that is there: the position of its last tensor
    for position, (name, tensor) in enumerate(entries):
        layer = enclosing(name, own)
        if layer:
            own[layer].append((name, tensor))
            last[layer] = position
    following: dict[int, list[str]] = {}
    place = -1
    for layer in layers:
        place = last.get(layer, place)
        if layer in without:
            following.setdefault(place, []).append(layer)
    for position, (name, tensor) in enumerate(entries):
        yield name, tensor, True
        for layer in following.get(position, ()):
            twin = without[layer]
            yield from ((layer + its_name.removeprefix(twin), its_tensor, False) for its_name, its_tensor in own[twin])


@contextmanager
def _hollow(layers: Sequence[str], classes: Sequence[type[nn.Module]], left_out: frozenset[str]) -> Iterator[None]:
    """Layers that are built inside stay empty modules if they are among ``left_out``.

    A model builds the layers of one class in the order in which its module tree lists them: counting tells which one
    is being built.
    """
    patches = []
    for kind in dict.fromkeys(classes):
        paths = [path for path, each in zip(layers, classes, strict=True) if each is kind]
        patches.append(patch.object(kind, "__init__", _counting(kind.__init__, paths, left_out)))
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def _counting(build: Callable[..., None], paths: Sequence[str], left_out: frozenset[str]) -> Callable[..., None]:
    upcoming = iter(paths)

    def build_or_not(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        if next(upcoming, None) in left_out:
            nn.Module.__init__(module)
        else:
            build(module, *args, **kwargs)

    return build_or_not


def _is_hollow(module: nn.Module) -> bool:
    return not module._modules and not module._parameters

"""Which layer's weights an operator works on where no layer runs, as in the optimizer's step.

Told apart by where the operator's inputs come from: weights, gradients, masters and states have names, and what is
computed from those of one layer alone belongs to that layer as well. What comes from nowhere, such as random numbers to
round with, belongs to the layer whose turn it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from badam.blocks.names import enclosing
from badam.vocabulary import Phase
from badam_planner.recording.recording import Recording
from badam_planner.rehearsal.fake_ops import moved_bytes

JOINING = frozenset([torch.ops.aten.stack.default, torch.ops.aten.cat.default])
"""Operators whose output holds something of each of their inputs."""

OUTSIDE = ""
"""In place of a layer: what belongs to weights outside of every layer, or of several layers."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Shares = tuple[tuple[str, int], ...]
"""Bytes by layer."""


class Owners:
    """The layers that recorded allocations belong to, by index of the allocation."""

    def __init__(self, layers: Collection[str], recording: Recording, index_of: Callable[[Tensor], int | None]) -> None:
        """Start with nothing known.

        Args:
            layers: module paths.
            recording: has the allocations.
            index_of: the allocation that a tensor looks at, None if it was never seen.
        """
        self._layers = layers
        self._recording = recording
        self._index_of = index_of
        self._layer_of: dict[int, str] = {}
        self._shares_in: dict[int, Shares] = {}
        self._phase = Phase.SETUP
        self._turn = OUTSIDE

    def told(self, index: int, name: str) -> str:
        """An allocation is, or belongs to, the weight called ``name``; returns the layer that this is in."""
        layer = self._layer_of[index] = enclosing(name, self._layers)
        return layer

    def begin(self, phase: Phase) -> None:
        """A phase begins: it is no layer's turn."""
        self._phase = phase
        self._turn = OUTSIDE

    def outputs(self, func: Any, arguments: Arguments, output: Any) -> Iterator[tuple[Tensor, str, Shares]]:
        """The tensors of an operator's output, each with the layer it belongs to and what layers have in it.

        Of a list that has one tensor for each of the first argument's, each belongs to what its counterpart does.
        """
        first: Any = arguments[0][0] if arguments[0] else None
        if _is_list(output) and _is_list(first) and len(output) == len(first):
            yield from ((made, self._among(given) or OUTSIDE, ()) for made, given in zip(output, first, strict=True))
            return
        layer = self.whose_turn(arguments)
        shares = self._joined(first) if func in JOINING else ()
        yield from ((leaf, layer, shares) for leaf in tree_leaves(output) if isinstance(leaf, Tensor))

    def computed(self, index: int, layer: str, shares: Shares) -> None:
        """An allocation came out of an operator, with what :meth:`outputs` says of it."""
        self._layer_of[index] = layer
        if shares:
            self._shares_in[index] = shares

    def traffic(self, func: Any, arguments: Arguments, moved: int) -> list[tuple[str, int]]:
        """The bytes that an operator moves by layer; they sum to ``moved``, and the last entry is not in the parts.

        Lists of equal length are taken item by item. Of tensors that join something of every layer, each layer has
        its share.
        """
        parts = _items(arguments)
        if not parts:
            mixed = self._shares_among(arguments)
            rest = moved - sum(nbytes for _, nbytes in mixed)
            return [*mixed, (self.whose_turn(arguments), rest)]
        found = []
        for args, kwargs in parts:
            joined = args[0] if func in JOINING else None  # each item goes into the output whole
            found.append((self._among(args) or OUTSIDE, moved_bytes(func, args, kwargs, joined)))
        return [*found, (OUTSIDE, moved - sum(nbytes for _, nbytes in found))]

    def whose_turn(self, values: Any) -> str:
        """The layer that an operator with these arguments works for: it is this layer's turn from now on."""
        layer = self._among(values)
        if layer is not None:
            self._turn = layer
        return self._turn

    def _among(self, values: Any) -> str | None:
        """The one layer that tensors among ``values`` belong to; None if nothing is known of any of them."""
        indices = [self._index_of(leaf) for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        found = {self._of(index) for index in indices if index is not None} - {None}
        if not found:
            return None
        layers = found - {OUTSIDE}
        return layers.pop() if len(layers) == 1 else OUTSIDE

    def _of(self, index: int) -> str | None:
        """The layer that an allocation belongs to; after backward that which made it there, if nothing else is known:
        so it is with sums over gradients.
        """
        known = self._layer_of.get(index)
        if known is None and self._phase is not Phase.BACKWARD:
            one = self._recording.allocations[index]
            if one.phase is Phase.BACKWARD:
                return enclosing(one.module, self._layers) or None
        return known

    def _joined(self, tensors: Sequence[Tensor]) -> Shares:
        totals: dict[str, int] = {}
        for tensor in tensors:
            if layer := self._among(tensor):
                totals[layer] = totals.get(layer, 0) + tensor.numel() * tensor.element_size()
        return tuple(totals.items())

    def _shares_among(self, values: Any) -> list[tuple[str, int]]:
        indices = [self._index_of(leaf) for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        return [share for index in indices if index in self._shares_in for share in self._shares_in[index]]


def _items(arguments: Arguments) -> list[Arguments]:
    """The arguments of an operator on lists of equal length, item by item and without the tensors that all items
    share; empty for any other operator.
    """
    args, kwargs = arguments
    lengths = {len(value) for value in (*args, *kwargs.values()) if _is_list(value)}
    if len(lengths) != 1:
        return []

    def only(value: Any, place: int) -> Any:
        if _is_list(value):
            return [value[place]]
        return None if isinstance(value, Tensor) else value

    return [
        (tuple(only(value, place) for value in args), {key: only(value, place) for key, value in kwargs.items()})
        for place in range(lengths.pop())
    ]


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(each, Tensor) for each in value)

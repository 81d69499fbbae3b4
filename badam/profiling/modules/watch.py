"""Follows a step through the modules: when each one's forward, recomputation and backward begin and end.

Forward and recomputation are seen by hooks on the modules. A module's backward begins when the node that made its
output is about to run, which a hook on that node sees, and ends where the node that made its input is about to, or
where another module's begins that is not inside it. torch's own backward hooks on modules would wrap inputs and outputs
in further nodes, which changes what is being measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from badam import phases
from badam.vocabulary import Phase


class SpanIndices(NamedTuple):
    """What was open from one boundary to another; module "" is the phase as a whole."""

    module: str
    phase: Phase
    begin: int
    end: int


class _Open(NamedTuple):
    module: str
    phase: Phase
    begin: int


class ModuleWatch:
    """Watches steps of one model, one at a time.

    Args:
        model: any module tree; shared modules go by their first name.
        boundary: called at each beginning and end; the n-th call is boundary n of the spans.
    """

    def __init__(self, model: nn.Module, boundary: Callable[[], None]) -> None:
        self._boundary = boundary
        self._boundaries = 0
        self._watching = False
        self._open: list[_Open] = []  # outer ones first; the first is the phase
        self._spans: list[SpanIndices] = []
        self._recomputation: _Recomputation | None = None
        self._called: set[str] = set()
        self._handles: list[RemovableHandle] = []
        for name, module in model.named_modules():
            if name:
                self._handles.append(module.register_forward_pre_hook(self._forward_hook(name)))
                self._handles.append(module.register_forward_hook(self._output_hook(name)))

    def begin(self) -> None:
        """Watch from here on, in the phase that is announced now."""
        self._watching = True
        self._open, self._spans, self._called = [], [], set()
        self._boundaries = 0
        self._recomputation = None
        self._open.append(_Open("", phases.current(), self._cut()))

    def end(self) -> list[SpanIndices]:
        """The spans since :meth:`begin`; watches no more. Between the two, all that took any time is in one."""
        self._watching = False
        self._close_above(0, self._cut())
        spans, self._spans = self._spans, []
        return spans

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def phase_begins(self, previous: Phase, phase: Phase) -> None:
        """``phase`` begins after ``previous``."""
        if not self._watching:
            return
        at = self._cut()
        if phase is Phase.RECOMPUTE:
            self._recomputation = _Recomputation(at, len(self._open))
        elif previous is Phase.RECOMPUTE and self._recomputation is not None:
            self._recomputation_ends(self._recomputation, at)
        else:
            self._close_above(0, at)
            self._open.append(_Open("", phase, at))

    def _forward_hook(self, name: str) -> Callable[..., None]:
        def begins(_module: nn.Module, inputs: Any) -> None:
            phase = phases.current()
            if not self._watching or phase not in (Phase.FORWARD, Phase.LOSS, Phase.RECOMPUTE):
                return
            at = self._cut()
            if self._recomputation is not None and self._recomputation.layer is None:
                self._recomputation_of(name.rpartition(".")[0], self._recomputation)
            self._called.add(name)
            self._open.append(_Open(name, phase, at))
            _before_backward_of(inputs, lambda _gradients: self._backward_ends(name))

        return begins

    def _output_hook(self, name: str) -> Callable[..., None]:
        def ends(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not self._watching:
                return
            place = self._place_of(name)
            if place is not None:
                self._close_above(place, self._cut())
            _before_backward_of(output, lambda _gradients: self._backward_begins(name))

        return ends

    def _backward_begins(self, name: str) -> None:
        if not self._watching or phases.current() is not Phase.BACKWARD or self._place_of(name) is not None:
            return
        at = self._cut()
        inside = len(self._open)
        while inside > 1 and not _is_inside(name, self._open[inside - 1].module):
            inside -= 1
        self._close_above(inside, at)
        # A node that makes a module's output makes that of the last module in it too, whose hook comes first.
        outermost = len(self._open[-1].module)
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            path = ".".join(parts[:length])
            if len(path) > outermost and path in self._called:
                self._open.append(_Open(path, Phase.BACKWARD, at))

    def _backward_ends(self, name: str) -> None:
        place = self._place_of(name) if self._watching and phases.current() is Phase.BACKWARD else None
        if place is not None:
            self._close_above(place, self._cut())

    def _recomputation_of(self, layer: str, recomputation: _Recomputation) -> None:
        """The layer is known now: what seemed to be the backward of its last part was waiting for this."""
        recomputation.layer = layer
        depth = next(
            (
                index
                for index, one in enumerate(self._open)
                if index and not _is_inside(layer, one.module, or_equal=True)
            ),
            len(self._open),
        )
        recomputation.interrupted = [one.module for one in self._open[depth:]]
        self._close_above(depth, recomputation.begin)
        recomputation.depth = len(self._open)
        self._open.append(_Open(layer, Phase.RECOMPUTE, recomputation.begin))

    def _recomputation_ends(self, recomputation: _Recomputation, at: int) -> None:
        self._recomputation = None
        if recomputation.layer is None:  # a function outside the modules, such as a part of the loss
            self._spans.append(SpanIndices("", Phase.RECOMPUTE, recomputation.begin, at))
        self._close_above(recomputation.depth, at)
        self._open += [_Open(module, Phase.BACKWARD, at) for module in recomputation.interrupted]

    def _place_of(self, name: str) -> int | None:
        phase = phases.current()
        for index in range(len(self._open) - 1, -1, -1):
            if self._open[index].module == name and self._open[index].phase is phase:
                return index
        return None

    def _close_above(self, depth: int, at: int) -> None:
        while len(self._open) > depth:
            module, phase, begin = self._open.pop()
            if at > begin:
                self._spans.append(SpanIndices(module, phase, begin, at))

    def _cut(self) -> int:
        self._boundary()
        self._boundaries += 1
        return self._boundaries - 1


class _Recomputation:
    """A recomputation under way: of which layer shows when its first part is called."""

    def __init__(self, begin: int, depth: int) -> None:
        self.begin = begin
        self.depth = depth  # of what was open when it began
        self.layer: str | None = None
        self.interrupted: list[str] = []


def _is_inside(name: str, module: str, *, or_equal: bool = False) -> bool:
    """Whether ``name`` is a part of ``module`` by their paths."""
    return name.startswith(f"{module}.") or (or_equal and name == module)


def _before_backward_of(made: Any, then: Callable[[tuple[Tensor, ...]], None]) -> None:
    """Call ``then`` when backward is about to run the node that made the first tensor in ``made``; it may have none."""
    node = next((tensor.grad_fn for tensor in _tensors(made) if tensor.grad_fn is not None), None)
    if node is not None:
        node.register_prehook(then)


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of a module's output, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))

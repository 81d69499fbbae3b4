"""The order in which a micro-batch goes through the modules, read from the places of its allocations. Pure, no torch.

A module's forward begins with the first allocation inside of it and ends when one outside follows; modules that
allocate nothing are not seen. Backward goes through a layer in the reverse order of its forward, and a layer that is
checkpointed computes its forward again once the backward of its last module has begun.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Sequence
from dataclasses import dataclass

from badam.blocks.names import belongs, enclosing
from badam.vocabulary import Phase
from badam_planner.multi_gpu.slots import SPREAD, Slot
from badam_planner.recording.recording import Allocation, Recording

ROOT = ""
LEFT_BEFORE = Slot.MODULE_BEGINS - Slot.MODULE_LEFT
"""From the first allocation in a module to when the module before it was left."""


@dataclass(frozen=True, slots=True)
class Use:
    """A module's forward or backward begins (``fetches``) or ends."""

    tick: int
    module: str
    is_forward: bool
    fetches: bool
    recomputes: bool = False  # forward within backward


def uses_of(recording: Recording, begins: int, turns: int, ends: int, roots: Container[str]) -> list[Use]:
    """The uses of all modules in one micro-batch.

    Args:
        recording: with its ticks spread out, see badam_planner.multi_gpu.per_rank.
        begins: tick of the micro-batch.
        turns: tick at which backward begins.
        ends: tick at which backward is over.
        roots: names of the modules directly below the model.
    """
    members = sorted(
        (one for one in recording.allocations if begins <= one.born < ends and one.module.partition(".")[0] in roots),
        key=lambda one: one.born,
    )
    forward = _Walk(is_forward=True)
    forward.enter(ROOT, begins + Slot.MODEL_BEGINS)
    for one in members:
        if one.born < turns:
            forward.visit(one)
    forward.end()
    marks = [mark for mark in recording.layer_marks if mark.kind == "backward" and turns <= mark.tick < ends]
    layers = {mark.layer for mark in marks}
    of_layer: dict[str, list[Use]] = {}
    for use in forward.uses:
        of_layer.setdefault(enclosing(use.module, layers), []).append(use)
    births = [one.born for one in members]
    stops = [bisect_left(births, tick) for tick in (turns, *(mark.tick for mark in marks), ends)]
    backward = _Walk(is_forward=False)
    backward.enter(ROOT, turns + Slot.MODEL_BEGINS)
    for one in members[stops[0] : stops[1]]:
        backward.visit(one)
    for mark, begin, end in zip(marks, stops[1:-1], stops[2:], strict=True):
        inside = [one for one in members[begin:end] if belongs(one.module, (mark.layer,))]
        backward.through(mark.tick, inside, of_layer.get(mark.layer, []))
        for one in members[begin:end]:
            if one.born > backward.last and not belongs(one.module, (mark.layer,)):
                backward.visit(one)
    return [*forward.uses, *backward.uses]


class _Walk:
    """Where in the module tree one direction is."""

    def __init__(self, *, is_forward: bool) -> None:
        self.is_forward = is_forward
        self.uses: list[Use] = []
        self.last = 0
        self._open: list[str] = []
        self._recomputes = False

    def visit(self, one: Allocation) -> None:
        """An allocation of a module: leave what it is not in, and enter what it is in."""
        again = not self.is_forward and one.phase is Phase.RECOMPUTE
        self.move(one.module, one.born, recomputes=again)
        self.last = one.born

    def move(self, path: str, tick: int, *, recomputes: bool = False) -> None:
        """Be in the module ``path`` from ``tick`` on; its forward within backward is another passage."""
        if recomputes != self._recomputes and self._open and self._open[-1] == path:
            self._leave(tick + LEFT_BEFORE)
        self._recomputes = recomputes
        while self._open and not _holds(self._open[-1], path):
            self._leave(
                min(self.last + Slot.MODULE_LEFT, tick + LEFT_BEFORE) if self.is_forward else tick + LEFT_BEFORE
            )
        for module in _chain(path, self._open[-1] if self._open else ROOT):
            self.enter(module, tick + Slot.MODULE_BEGINS)

    def enter(self, module: str, tick: int) -> None:
        """Begin a module's passage."""
        self._open.append(module)
        self.uses.append(Use(tick, module, self.is_forward or self._recomputes, True, self._recomputes))

    def end(self) -> None:
        """Leave everything."""
        while self._open:
            self._leave(self.last + Slot.MODULE_LEFT)

    def through(self, start: int, passage: Sequence[Allocation], forward: Sequence[Use]) -> None:
        """Backward of one layer, in the reverse of the order in which ``forward``, its own, left the modules."""
        order = list(dict.fromkeys(use.module for use in reversed(forward) if not use.fetches))
        births: dict[str, list[int]] = {}
        for one in passage:
            if one.phase is not Phase.RECOMPUTE:
                births.setdefault(one.module, []).append(one.born)
        again = [one for one in passage if one.phase is Phase.RECOMPUTE]
        tick, recomputed = start + SPREAD, not again
        for index, module in enumerate(order):
            if index and recomputed:
                tick = next((born for born in births.get(module, ()) if born > tick), tick)
            self.move(module, tick)
            holds_next = index + 1 < len(order) and _holds(module, order[index + 1])
            if not recomputed and not holds_next:
                recomputed = True
                is_through = any(born < again[0].born for ticks in births.values() for born in ticks)
                if is_through:  # it is frozen and linear, and needed nothing that was computed in forward
                    self._leave(again[0].born + LEFT_BEFORE)
                self._recompute(again, forward[1:], module, reaches=not is_through)
                tick = again[-1].born
            self.last = tick

    def _recompute(self, again: Sequence[Allocation], forward: Sequence[Use], last: str, *, reaches: bool) -> None:
        """Forward within backward: the same uses, up to the layer's ``last`` module, whose begin it ``reaches`` or not.

        It stops as soon as it has what backward needs, in the middle of modules that never end.
        """
        stop = next(index for index, use in enumerate(forward) if use.module == last and use.fetches is not reaches)
        uses = forward[:stop]
        containers = {use.module.rpartition(".")[0] for use in uses}
        over = again[-1].born + SPREAD - 1
        births: list[int] = []  # of the first allocation in each module that holds no other
        for use in uses:
            if use.fetches and use.module not in containers:
                after = births[-1] if births else again[0].born - 1
                births.append(next((one.born for one in again if one.born > after and one.module == use.module), over))
        timed = []
        following = over
        for use in reversed(uses):
            if use.fetches and use.module not in containers:
                following = births.pop()
            tick = following + (Slot.MODULE_BEGINS if use.fetches else LEFT_BEFORE)
            timed.append(Use(tick, use.module, True, use.fetches, use.fetches))
        self.uses += reversed(timed)

    def _leave(self, tick: int) -> None:
        self.uses.append(Use(tick, self._open.pop(), self.is_forward or self._recomputes, False))


def _holds(module: str, path: str) -> bool:
    return module == ROOT or path == module or path.startswith(f"{module}.")


def _chain(path: str, ancestor: str) -> list[str]:
    """The modules from below ``ancestor`` down to ``path``; lists of modules, whose members have numbers, never run."""
    words = path.split(".")
    below = len(ancestor.split(".")) if ancestor else 0
    ends = [index for index in range(below + 1, len(words) + 1) if index == len(words) or not words[index].isdigit()]
    return [".".join(words[:end]) for end in ends]

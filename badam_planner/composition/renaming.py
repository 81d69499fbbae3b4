"""Recordings of layers under the names of other layers that do the same. Pure, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from badam.vocabulary import Phase
from badam_planner.recording.recording import GIVEN, Allocation, Recording

Work = TypeVar("Work")
"""What is added up by phase and module: operations, traffic."""


class Renamer:
    """Replaces the start of a module path by its counterpart; remembers, since few paths come often."""

    def __init__(self, old: Sequence[str], new: Sequence[str]) -> None:
        self._pairs = [pair for pair in zip(old, new, strict=True) if pair[0] != pair[1]]
        self._known: dict[str, str] = {}

    def __call__(self, path: str) -> str:
        """The path with the first of the old ones that it is, or lies in, replaced."""
        if not self._pairs:
            return path
        known = self._known.get(path)
        if known is None:
            known = self._known[path] = self._replaced(path)
        return known

    def _replaced(self, path: str) -> str:
        for before, after in self._pairs:
            if path == before or path.startswith(f"{before}."):
                return after + path.removeprefix(before)
        return path

    def moved(self, one: Allocation, born: int, died: int) -> Allocation:
        """The same allocation in another layer at another time. (dataclasses.replace would take twice as long.)"""
        where, parameter = self(one.module), self(one.parameter) if one.parameter else ""
        owner = self(one.owner) if one.owner else ""
        shares = tuple((self(layer), nbytes) for layer, nbytes in one.shares) if one.shares else ()
        return Allocation(
            one.nbytes, born, died, one.phase, where, one.operation, one.shape, one.dtype, one.category, one.role,
            parameter, one.state, one.gpu_only, owner, shares, one.grown, one.size_law, one.rule, one.rows,
            one.stream,
        )  # fmt: skip


def renamed(recording: Recording, names: Mapping[str, str]) -> Recording:
    """The recording of the same roles played by other layers: ``names`` maps module paths to module paths.

    What was there before the rehearsal, the parameters, keeps its names: all layers have theirs in the recording.
    """
    if all(old == new for old, new in names.items()):
        return recording
    renamer = Renamer(tuple(names), tuple(names.values()))
    return replace(
        recording,
        allocations=[
            one if one.operation == GIVEN else renamer.moved(one, one.born, one.died) for one in recording.allocations
        ],
        layer_marks=[replace(mark, layer=names.get(mark.layer, mark.layer)) for mark in recording.layer_marks],
        flops=renamed_work(recording.flops, names),
        traffic=renamed_work(recording.traffic, names),
    )


def renamed_work(work: dict[tuple[Phase, str], Work], names: Mapping[str, str]) -> dict[tuple[Phase, str], Work]:
    """Work by phase and module under the names of other layers."""
    if all(old == new for old, new in names.items()):
        return work
    renamer = Renamer(tuple(names), tuple(names.values()))
    return {(phase, renamer(module)): amount for (phase, module), amount in work.items()}

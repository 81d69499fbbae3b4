"""Recordings written by hand, event by event."""

from __future__ import annotations

from typing import Any, Literal

from hypothesis import strategies as st

from badam.vocabulary import Category, Phase
from badam_planner.recording.recording import NEVER, Allocation, LayerMark, Recording


class Script:
    """Writes a recording in order of time; every call is one tick of its clock."""

    def __init__(self) -> None:
        self.recording = Recording()
        self._phase = Phase.SETUP

    def phase(self, phase: Phase) -> None:
        """``phase`` begins."""
        self._phase = phase
        self.recording.phase_starts.append((self._tick(), phase))

    def mark(self, kind: Literal["forward", "backward"], layer: str) -> None:
        """A layer begins."""
        self.recording.layer_marks.append(LayerMark(self._tick(), kind, layer))

    def birth(self, nbytes: int, module: str = "", **fields: Any) -> int:
        """An allocation; returns its index."""
        facts: dict[str, Any] = {"operation": "aten.mm", "shape": (nbytes,), "dtype": "uint8", **fields}
        self.recording.allocations.append(
            Allocation(nbytes=nbytes, born=self._tick(), died=NEVER, phase=self._phase, module=module, **facts)
        )
        return len(self.recording.allocations) - 1

    def death(self, *indices: int) -> None:
        """Releases, one after the other."""
        for index in indices:
            self.recording.allocations[index].died = self._tick()

    def _tick(self) -> int:
        self.recording.end += 1
        return self.recording.end - 1


@st.composite
def scripted(draw: st.DrawFn) -> Recording:
    """Any recording: births, deaths and phases in any order, some allocations with a category of their own."""
    script = Script()
    alive: list[int] = []
    for _ in range(draw(st.integers(0, 25))):
        what = draw(st.sampled_from(["birth", "birth", "death", "phase"]))
        if what == "birth":
            nbytes = draw(st.one_of(st.integers(0, 2000), st.integers(0, 30 * 2**20)))
            category = draw(st.sampled_from([None, None, Category.PARAMETER, Category.GRADIENT]))
            module = draw(st.sampled_from(["", "loss", "lm_head", "layers.0"]))
            alive.append(script.birth(nbytes, module, category=category, gpu_only=draw(st.booleans())))
        elif what == "death" and alive:
            script.death(alive.pop(draw(st.integers(0, len(alive) - 1))))
        elif what == "phase":
            script.phase(draw(st.sampled_from(list(Phase))))
    return script.recording

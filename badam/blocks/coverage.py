"""Which blocks a run of a given length would train. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from badam.blocks.schedule import BlockSchedule
from badam.plan import Plan


@dataclass(frozen=True, slots=True)
class Coverage:
    """What a number of optimizer steps reaches under a plan's schedule."""

    steps: int
    switch_every: int
    unvisited: tuple[str, ...]  # names of the blocks that would never train
    covering_switch_every: int | None  # the largest K with a whole visit to each block; None: too few steps

    def warning(self) -> str | None:
        """A sentence for the user before the run, or None if every block is reached."""
        if not self.unvisited:
            return None
        shown = ", ".join(self.unvisited[:5]) + (f" and {len(self.unvisited) - 5} more" if self.unvisited[5:] else "")
        text = (
            f"{len(self.unvisited)} blocks will never train within {self.steps} steps of K = {self.switch_every}: "
            f"{shown}."
        )
        if self.covering_switch_every is None:
            return f"{text} There are fewer steps than blocks; train longer."
        return f"{text} Plan with --switch-every {self.covering_switch_every} to reach all."


def coverage(plan: Plan, steps: int) -> Coverage:
    """Which blocks ``steps`` optimizer steps would reach; ``fixed`` means one block and counts as complete."""
    blocks = plan.partition.blocks
    settings = plan.schedule
    schedule = BlockSchedule(settings.switch_mode, settings.switch_every, len(blocks), settings.seed)
    visits = schedule.visit_at_step(max(steps - 1, 0)) + 1
    visited = {schedule.block_at(visit) for visit in range(min(visits, len(blocks)))}
    missing = [block.name for index, block in enumerate(blocks) if index not in visited]
    return Coverage(
        steps=steps,
        switch_every=settings.switch_every,
        unvisited=() if settings.switch_mode == "fixed" else tuple(missing),
        covering_switch_every=steps // len(blocks) or None,
    )

"""Which block is active at step t: a pure function of mode, K, D and seed; and which blocks a run reaches. No torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import get_args

from badam.errors import InputError, near_matches
from badam.plan import Plan
from badam.vocabulary import SwitchMode


@dataclass(frozen=True, slots=True)
class BlockSchedule:
    """The order in which blocks are visited, ``switch_every`` optimizer steps each.

    Args:
        mode: ``ascending`` and ``descending`` go through the blocks in model order, ``random`` through a new
            permutation in every block epoch, ``fixed`` stays at one block (each visit still starts with fresh state).
        switch_every: K, the optimizer steps of one visit; 0 or less never switches.
        num_blocks: D.
        seed: of the permutations. They come from a hash, so they are the same on every platform and version, and no
            random number generator is touched.
        start_block: the block of the first visit; by default the last one for ``descending``, the first drawn for
            ``random``, else block 0.

    Raises:
        InputError: for an unknown mode, no blocks, or a start block that does not exist.
    """

    mode: SwitchMode
    switch_every: int
    num_blocks: int
    seed: int = 0
    start_block: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(SwitchMode):
            known = ", ".join(near_matches(self.mode, get_args(SwitchMode)) or get_args(SwitchMode))
            raise InputError(f"Unknown switch mode {self.mode!r}.", advice=f"Choose {known}.")
        if self.num_blocks < 1:
            raise InputError(f"A schedule needs at least one block, got {self.num_blocks}.")
        if self.start_block is not None and not 0 <= self.start_block < self.num_blocks:
            raise InputError(
                f"start_block is {self.start_block}, but there are {self.num_blocks} blocks.",
                advice=f"Choose 0 to {self.num_blocks - 1}.",
            )

    def block_at(self, visit: int) -> int:
        """The block that visit number ``visit`` (from 0) trains."""
        epoch, position = divmod(visit, self.num_blocks)
        return self.order(epoch)[position]

    def block_at_step(self, step: int) -> int:
        """The block that optimizer step number ``step`` (from 0) trains."""
        return self.block_at(self.visit_at_step(step))

    def visit_at_step(self, step: int) -> int:
        """The visit that optimizer step number ``step`` (from 0) belongs to."""
        return step // self.switch_every if self.switch_every > 0 else 0

    def ends_visit(self, steps_in_visit: int) -> bool:
        """Whether a visit is over once it has had ``steps_in_visit`` steps."""
        return 0 < self.switch_every <= steps_in_visit

    def order(self, epoch: int) -> tuple[int, ...]:
        """The order in which block epoch number ``epoch`` (from 0) visits the blocks."""
        if self.mode == "fixed":
            return (self.start_block or 0,) * self.num_blocks
        if self.mode == "random":
            return self._permutation(epoch)
        direction = 1 if self.mode == "ascending" else -1
        start = self.start_block if self.start_block is not None else (0 if direction == 1 else self.num_blocks - 1)
        return tuple((start + direction * position) % self.num_blocks for position in range(self.num_blocks))

    def _permutation(self, epoch: int) -> tuple[int, ...]:
        def rank(block: int) -> tuple[bool, bytes]:
            drawn = hashlib.sha256(f"{self.seed}:{epoch}:{block}".encode()).digest()
            return (epoch > 0 or block != self.start_block, drawn)

        return tuple(sorted(range(self.num_blocks), key=rank))


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

"""How every contestant gets its learning rate, by the same rule. Pure.

Three rates half a decade apart are tried with the first seed: the contestant's own and its two neighbours. As long as
the best of them is the smallest or the largest tried, the next one beyond it is tried too, up to four in all. The best
one runs with the other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

MOST_RATES = 4
PER_DECADE = 2


def rate_at(start: float, position: int) -> float:
    """The rate ``position`` half decades above ``start``, rounded to two digits: 1e-3, 3.2e-3, 1e-2."""
    return float(f"{start * 10 ** (position / PER_DECADE):.1e}")


def next_position(
    losses: Mapping[int, float], *, first: Sequence[int] = (0, -1, 1), most: int = MOST_RATES
) -> int | None:
    """The position to try next, or None if the best one is known; a loss that is no number is the worst.

    Args:
        losses: by position, of the rates that were tried.
        first: positions that are tried in any case, in this order.
        most: rates to try in all.
    """
    for position in first:
        if position not in losses:
            return position
    best = best_position(losses)
    if len(losses) >= most:
        return None
    if best == min(losses):
        return best - 1
    return best + 1 if best == max(losses) else None


def best_position(losses: Mapping[int, float]) -> int:
    """The position with the lowest loss."""
    return min(losses, key=lambda position: losses[position] if math.isfinite(losses[position]) else math.inf)

"""How many GPUs to take, and into what groups to divide them. Pure."""

from __future__ import annotations

from collections.abc import Callable

MOST_GPUS = 4096
"""More GPUs than this are not tried: a model that does not fit then does not fit for its activations."""


def smallest_number(fits: Callable[[int], bool]) -> int | None:
    """The smallest number of GPUs for which ``fits`` is true, taking it to stay true for more; None up to the most."""
    most = 1
    while not fits(most):
        most *= 2
        if most > MOST_GPUS:
            return None
    least = most // 2  # does not fit, or 0
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if fits(middle) else (middle, most)
    return most


def shard_sizes(gpus: int, gpus_per_node: int) -> list[int]:
    """Into groups of how many ``gpus`` can be divided, the smallest first, so that groups do not straddle machines.

    Groups of one are left out: they hold whole copies.
    """
    several_nodes = gpus > gpus_per_node
    return [
        size
        for size in range(2, gpus + 1)
        if gpus % size == 0
        and (size == gpus or not several_nodes or gpus_per_node % size == 0 or size % gpus_per_node == 0)
    ]

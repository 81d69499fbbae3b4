"""How many GPUs to take, and into what groups to divide them. Pure."""

from __future__ import annotations

from collections.abc import Callable

MOST_GPUS = 4096
"""More GPUs than this are not tried: a model that does not fit then does not fit for its activations."""

ROUNDS = 4


def smallest_number(fits: Callable[[int], bool], guess: int = 1) -> int | None:
    """The smallest number of GPUs for which ``fits`` is true, taking it to stay true for more; None up to the most.

    Args:
        fits: asked of few numbers: two if the guess is right.
        guess: where to begin; below it steps double, above it powers of two are tried.
    """
    least, most, step = 0, guess, 1
    if fits(guess):
        while most > 1 and fits(below := max(most - step, 1)):
            most, step = below, 2 * step
        least = max(most - step, 1) if most > 1 else 0
    else:
        least = guess
        # Powers of two above it: they divide what models are made of, and past one of them padding can make all of
        # its shards larger, so that a step beyond may need more again.
        while not fits(most := min(1 << least.bit_length(), MOST_GPUS)):
            if most == MOST_GPUS:
                return None
            least = most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if fits(middle) else (middle, most)
    return most


def guessed_number(needed: Callable[[int], int], usable_bytes: int, least: int) -> int:
    """About how many GPUs are needed, from what each of a few numbers of them needs.

    Formula: a + b / n <= usable, where a is what no sharding divides. What is needed is the highest of several such
    lines, one for each moment of a step, so a and b are taken at n and 2 n, beginning with ``least``, until the line at
    the answer is the one that it came from.

    Args:
        needed: device bytes of each of so many GPUs.
        usable_bytes: of each.
        least: number with which the weights alone would fit; from 2 on.
    """
    number = least
    for _ in range(ROUNDS):
        one, two = needed(number), needed(2 * number)
        divided = 2 * number * (one - two)
        whole = one - divided // number
        if usable_bytes <= whole:
            return number
        found = min(max(-(-divided // (usable_bytes - whole)), least), MOST_GPUS)
        if found <= number + 1:
            return found
        number = found
    return number


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

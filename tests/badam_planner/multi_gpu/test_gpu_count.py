"""How many GPUs are taken, and into what groups they are divided."""

from __future__ import annotations

import pytest

from badam.plan import Target
from badam_planner.multi_gpu.gpu_count import guessed_number, shard_sizes, smallest_number


@pytest.mark.parametrize("wanted", [1, 2, 3, 7, 8, 100])
def test_the_smallest_number_of_cards_is_found(wanted: int) -> None:
    assert smallest_number(lambda cards: cards >= wanted) == wanted


@pytest.mark.parametrize("guess", [1, 2, 50, 99, 100, 101, 400, 4096])
@pytest.mark.parametrize("wanted", [1, 2, 99, 100, 4096])
def test_a_guess_changes_how_many_are_asked_and_not_the_answer(wanted: int, guess: int) -> None:
    asked: list[int] = []

    def fits(number: int) -> bool:
        asked.append(number)
        return number >= wanted

    assert smallest_number(fits, guess) == wanted
    assert len(asked) == len(set(asked)) <= 26
    if guess == wanted:
        assert len(asked) <= 2


def test_a_power_of_two_is_found_past_which_padding_takes_more_again() -> None:
    assert smallest_number(lambda number: 256 <= number < 270, 200) == 256


@pytest.mark.parametrize("guess", [1, 100, 4096])
def test_a_guess_finds_no_number_where_none_fits(guess: int) -> None:
    assert smallest_number(lambda _: False, guess) is None


def test_the_number_is_guessed_from_the_moment_that_decides() -> None:
    def needed(number: int) -> int:  # one moment with much to divide, a later one with more that is not divided
        return max(1000 + 64_000 // number, 3000 + 16_000 // number)

    assert guessed_number(needed, 3100, 2) == 160
    assert needed(160) == 3100
    assert guessed_number(needed, 2500, 2) >= 2  # nothing is enough; the search says so
    assert guessed_number(lambda number: 10**9 // number, 10**6, 2) == 1000


def test_no_number_of_cards_is_found_where_none_fits() -> None:
    assert smallest_number(lambda _: False) is None


@pytest.mark.parametrize(
    ("cards", "per_node", "sizes"),
    [(8, 8, [2, 4, 8]), (48, 8, [2, 4, 8, 16, 24, 48]), (12, 8, [2, 4, 12]), (12, 16, [2, 3, 4, 6, 12]), (7, 4, [7])],
)
def test_groups_that_straddle_machines_are_not_tried(cards: int, per_node: int, sizes: list[int]) -> None:
    assert shard_sizes(cards, per_node) == sizes


def test_every_layout_of_a_plan_deals_out_all_cards() -> None:
    with pytest.raises(ValueError, match="16 cards cannot be divided into groups of 6"):
        Target(gpu="cpu", total_bytes=1, usable_bytes=1, engine="fsdp2", num_gpus=16, shard_size=6)
    with pytest.raises(ValueError, match="needs the engine fsdp2, not zero3"):
        Target(gpu="cpu", total_bytes=1, usable_bytes=1, engine="zero3", num_gpus=16, shard_size=8)
    with pytest.raises(ValueError, match="those of the engine ddp"):
        Target(gpu="cpu", total_bytes=1, usable_bytes=1, engine="fsdp2", num_gpus=16, shard_size=1)

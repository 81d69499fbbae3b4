from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from badam import errors
from badam.errors import (
    BadamError,
    DataError,
    DoesNotFit,
    InputError,
    OutOfMemory,
    PlanError,
    StateError,
    in_one_line,
    near_matches,
)


def test_every_error_of_ours_is_of_one_family() -> None:
    classes = [each for each in vars(errors).values() if isinstance(each, type) and each.__module__ == errors.__name__]
    assert len(classes) >= 7
    assert all(issubclass(each, BadamError) for each in classes)


@pytest.mark.parametrize(("kind", "code"), [(InputError, 2), (PlanError, 2), (DoesNotFit, 1), (OutOfMemory, 3)])
def test_the_kind_of_an_error_decides_the_exit_code(kind: type[BadamError], code: int) -> None:
    assert kind("it").exit_code == code


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (InputError, ValueError),
        (PlanError, ValueError),
        (DataError, ValueError),
        (StateError, ValueError),
        (OutOfMemory, RuntimeError),
    ],
)
def test_a_host_that_catches_what_torch_raises_catches_ours(kind: type[BadamError], builtin: type[Exception]) -> None:
    with pytest.raises(builtin) as caught:
        raise kind("It is wrong.", advice="Mend it.")
    assert isinstance(caught.value, BadamError)
    assert str(caught.value) == "It is wrong. Mend it."


def test_message_and_advice_are_kept_apart_and_read_together() -> None:
    error = InputError("No such card.", advice="Name another.")
    assert (error.message, error.advice) == ("No such card.", "Name another.")
    assert str(error) == "No such card. Name another."
    assert str(InputError("No such card.")) == "No such card."


GPUS = ["rtx3090", "rtx3080", "rtx4090", "a100-80gb", "a100-40gb", "h100-sxm", "l4"]


@pytest.mark.parametrize(
    ("name", "best"),
    [("rtx3091", "rtx3090"), ("RTX 4090", "rtx4090"), ("A100 80GB", "a100-80gb"), ("h100", "h100-sxm")],
)
def test_the_nearest_name_comes_first_whatever_its_case_and_punctuation(name: str, best: str) -> None:
    assert near_matches(name, GPUS)[0] == best


def test_a_part_of_a_name_finds_all_that_contain_it_shorter_ones_first() -> None:
    assert near_matches("llama", ["meta/Llama-2-70b-hf", "other", "meta/Llama-3", "x"]) == [
        "meta/Llama-3",
        "meta/Llama-2-70b-hf",
    ]


def test_nothing_alike_is_found_for_nonsense() -> None:
    assert near_matches("zzzzzzzzzzzz", GPUS) == []
    assert near_matches("", GPUS) == []


def test_no_more_names_than_asked_for() -> None:
    assert len(near_matches("rtx", GPUS, limit=2)) == 2


@given(st.text(max_size=12), st.lists(st.text(max_size=12), max_size=8), st.integers(0, 5))
def test_matches_are_known_names_without_repetition(name: str, known: list[str], limit: int) -> None:
    found = near_matches(name, known, max(limit, 1))
    assert len(found) <= max(limit, 1)
    assert len(set(found)) == len(found)
    assert set(found) <= set(known)


@given(st.lists(st.sampled_from(GPUS), min_size=1, unique=True))
def test_a_known_name_is_its_own_best_match(known: list[str]) -> None:
    for name in known:
        assert near_matches(name.upper().replace("-", " "), known)[0] == name


def test_a_foreign_exception_is_told_in_one_line() -> None:
    assert in_one_line(ValueError("first\n    second\t third")) == "ValueError: first second third"
    assert in_one_line(KeyError("x")) == "KeyError: 'x'"
    long = in_one_line(RuntimeError("x" * 500), most=50)
    assert len(long) == 51
    assert long.endswith("…")

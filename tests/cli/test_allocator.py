"""What badam-train tells torch's allocator."""

from __future__ import annotations

import pytest

from badam.plan import Target
from badam_cli._allocator import SETTINGS, configure_allocator

USUAL = Target(gpu="card", total_bytes=2, usable_bytes=1)
GROWING = USUAL.model_copy(update={"expandable_segments": True})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({SETTINGS: "max_split_size_mb:512"}, "max_split_size_mb:512,expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, "max_split_size_mb:512,expandable_segments:True"),
        ({SETTINGS: "expandable_segments:true"}, "expandable_segments:true"),
    ],
)
def test_a_plan_that_counts_on_expandable_segments_gets_them(given: dict[str, str], expected: str) -> None:
    configure_allocator(GROWING, given)
    assert given[SETTINGS] == expected


def test_what_the_user_switched_off_stays_off_and_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    given = {SETTINGS: "expandable_segments:False,max_split_size_mb:64"}
    configure_allocator(GROWING, given)
    assert given == {SETTINGS: "expandable_segments:False,max_split_size_mb:64"}
    assert "'expandable_segments:False,max_split_size_mb:64' switches off" in capsys.readouterr().err


def test_other_plans_leave_the_environment_alone() -> None:
    environment: dict[str, str] = {}
    configure_allocator(USUAL, environment)
    assert environment == {}

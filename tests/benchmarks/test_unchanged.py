"""The comparison of two records, and that a record covers what it says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from badam.vocabulary import Phase
from badam_planner.recording.recording import Allocation, Recording
from benchmarks import unchanged
from benchmarks.recorded import composed, cpu_table, forks, plans
from benchmarks.recorded.plain import without

AROUND = {"processor": "one", "torch": "2.13"}


def written(path: Path, around: dict[str, str] | None = None, **parts: dict[str, Any]) -> str:
    content = {name: {"revision": "abc", "cases": cases} for name, cases in parts.items()}
    path.write_text(json.dumps({"surroundings": around or AROUND, "parts": content}), encoding="utf-8")
    return str(path)


def test_equal_records_are_identical_whatever_the_order_of_their_fields(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = written(tmp_path / "old.json", plans={"a": {"peak": 1, "phases": {"loss": 2, "step": 3}}})
    new = written(tmp_path / "new.json", plans={"a": {"phases": {"step": 3, "loss": 2}, "peak": 1}})
    assert unchanged.main(["compare", old, new, "--part", "plans"]) == 0
    assert "1 of 1 identical" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ({"a": {"peak": 2, "blocks": [1, 2]}, "b": 0}, "a |.peak: 1 -> 2"),
        ({"a": {"peak": 1.0, "blocks": [1, 2]}, "b": 0}, "a |.peak: 1 -> 1.0"),
        ({"a": {"peak": 1, "blocks": [1, 3]}, "b": 0}, "a |.blocks[1]: 2 -> 3"),
        ({"a": {"peak": 1, "blocks": [1]}, "b": 0}, "a |.blocks: [1, 2] -> [1]"),
        ({"a": {"peak": 1}, "b": 0}, "a |.blocks: only in the older"),
        ({"a": {"peak": 1, "blocks": [1, 2], "host": 0}, "b": 0}, "a |.host: only in the newer"),
        ({"a": {"peak": 1, "blocks": [1, 2]}}, "b |: 0 -> null"),
    ],
)
def test_what_differs_is_named_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], after: dict[str, Any], said: str
) -> None:
    old = written(tmp_path / "old.json", plans={"a": {"peak": 1, "blocks": [1, 2]}, "b": 0})
    new = written(tmp_path / "new.json", plans=after)
    assert unchanged.main(["compare", old, new, "--part", "plans"]) == 1
    printed = capsys.readouterr().out
    assert f"plans | {said}" in printed
    assert "1 of 2 identical" in printed


@pytest.mark.parametrize(("measured", "code"), [(1_000_064, 0), (1_000_065, 1), (999_935, 1), (None, 1)])
def test_what_was_measured_may_differ_by_a_few_scalars_and_what_is_predicted_not(
    tmp_path: Path, measured: int | None, code: int
) -> None:
    old = written(tmp_path / "old.json", cpu={"a": {"predicted": 1_000_000, "measured": 1_000_000}})
    new = written(tmp_path / "new.json", cpu={"a": {"predicted": 1_000_000, "measured": measured}})
    off = written(tmp_path / "off.json", cpu={"a": {"predicted": 1_000_001, "measured": 1_000_000}})
    assert unchanged.main(["compare", old, new, "--part", "cpu"]) == code
    assert unchanged.main(["compare", old, off, "--part", "cpu"]) == 1


def test_only_the_named_cases_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = written(tmp_path / "old.json", plans={"gpt2 on a": 1, "llama on b": 2})
    new = written(tmp_path / "new.json", plans={"gpt2 on a": 1})
    assert unchanged.main(["compare", old, new, "--part", "plans", "--only", "gpt2"]) == 0
    assert "1 of 1 identical" in capsys.readouterr().out
    assert unchanged.main(["compare", old, new, "--part", "plans", "--only", "bloom"]) == 2


def test_records_of_different_libraries_or_without_the_part_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = written(tmp_path / "old.json", plans={"a": 1})
    other = written(tmp_path / "other.json", {**AROUND, "torch": "2.12"}, plans={"a": 1})
    assert unchanged.main(["compare", old, other, "--part", "plans"]) == 2
    assert "2.12" in capsys.readouterr().err
    assert unchanged.main(["compare", old, old]) == 2
    assert "no composed and no resumed and no cpu" in capsys.readouterr().err
    (tmp_path / "cut.json").write_text('{"surroundings": {', encoding="utf-8")
    assert unchanged.main(["compare", old, str(tmp_path / "cut.json")]) == 2
    assert unchanged.main(["compare", str(tmp_path / "none.json"), old]) == 2


def test_cases_run_alone_and_come_back_in_order() -> None:
    def own_process() -> list[Any]:
        return [os.getpid(), str(Path.cwd())]

    first, second = forks.run_all({"b": own_process, "a": own_process}).items()
    assert (first[0], second[0]) == ("b", "a")
    assert len({os.getpid(), first[1][0], second[1][0]}) == 3
    assert len({str(Path.cwd()), first[1][1], second[1][1]}) == 3
    assert not Path(first[1][1]).exists()


def test_a_case_that_fails_ends_the_record_with_its_name_and_reason() -> None:
    def failing() -> None:
        raise ValueError("the reason")

    with pytest.raises(forks.CaseFailed, match=r"(?s)second.*the reason"):
        forks.run_all({"first": dict, "second": failing})


def test_sixty_plans_ask_for_every_method_engine_and_kind_of_block() -> None:
    assert len(set(plans.PLANS)) == len(plans.PLANS) == 60
    asked = [options.split() for options in plans.PLANS]

    def values(option: str) -> set[str]:
        return {options[options.index(option) + 1] for options in asked if option in options}

    assert values("--method") | {"badam"} == {
        "badam", "badam-ratio", "adam", "lora", "qlora", "lomo", "adalomo", "galore", "lisa", "hift", "mezo",
    }  # fmt: skip
    assert values("--engine") == {"ddp", "fsdp2", "zero3"}
    assert values("--partition") == {"layer", "attn-mlp", "matrix"}
    assert values("--checkpointing") == {"all", "none"}
    assert values("--loss") == {"full", "chunked"}
    assert len(values("--gpu") - {"cpu"}) >= 3
    assert len({options[0] for options in asked}) >= 20


def test_three_hundred_and_sixty_rehearsals_and_forty_runs_are_drawn_alike_each_time() -> None:
    names = list(composed.cases())
    assert names == list(composed.cases())
    assert len(names) == 360
    assert sum("lomo" in name for name in names) == 60
    chosen = list(cpu_table.cases())
    assert len(set(chosen)) == 40
    assert len({name.partition("-")[0] for name in chosen}) == 12


def test_a_rehearsal_is_described_the_same_twice_and_otherwise_for_another_block() -> None:
    drawn = composed.Drawn("llama", 6, "badam", "layer", "all", "full", 2, 8, 1, False, "cpu", 0.0)
    other = composed.Drawn("llama", 6, "badam", "layer", "all", "full", 2, 8, 1, False, "cpu", 0.9)
    found = composed.compose(drawn)
    assert composed.compose(drawn) == found
    assert found["peaks"]["backward"][0] == found["peaks as on the device"]["backward"]
    differing = {name for name, value in composed.compose(other).items() if found[name] != value}
    assert {"bytes", "order", "names", "work", "peaks"} <= differing


def test_order_is_told_apart_and_ticks_are_not() -> None:
    def recording(*lives: tuple[int, int]) -> Recording:
        allocations = [
            Allocation(nbytes=8, born=born, died=died, phase=Phase.FORWARD, module="", operation="", shape=(), dtype="")
            for born, died in lives
        ]
        return Recording(allocations=allocations)

    order = composed._order(recording((1, 3), (2, 4)))
    assert composed._order(recording((10, 30), (20, 40))) == order
    assert composed._order(recording((1, 4), (2, 3))) != order


def test_left_out_fields_go_at_any_depth_and_fractions_keep_twelve_digits() -> None:
    plan = {"date": 1, "inner": [{"date": 2, "seconds": 0.1 + 0.2}], "bytes": 2**60 + 1}
    assert without(plan, {"date"}) == {"inner": [{"seconds": 0.3}], "bytes": 2**60 + 1}

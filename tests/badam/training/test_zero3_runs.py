"""badam-train in two processes under ZeRO-3, with and without what is offloaded; skipped without DeepSpeed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from badam.training.run_directory import is_whole
from tests.badam.distributed.workers import on_ranks
from tests.badam.training import several
from tests.badam.training.test_several import losses, plan_on, weights
from tests.badam.training.tiny import records, run_tiny, write_jsonl

pytestmark = pytest.mark.slow

STEPS, SAVED_AT = 6, 3  # visits have two steps, so the checkpoint is in the middle of one


def target_of(offload: str) -> dict[str, Any]:
    return {"target": {**json.loads(plan_on("zero3", 2).model_dump_json())["target"], "offload": offload}}


def in_bf16(offload: str) -> dict[str, Any]:
    plan = json.loads(plan_on("zero3", 2).model_dump_json())
    return {**target_of(offload), "training": {**plan["training"], "dtype": "bfloat16"}}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("alone")
    run_tiny(plan_on("single", 1), directory, padding="plan", max_steps=STEPS, lr_scheduler="constant")
    return directory / "run"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """The directory of all runs, and their errors in each process."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    directory = tmp_path_factory.mktemp("zero3")
    data = str(write_jsonl(directory / "data.jsonl", records()))
    common: dict[str, Any] = {"data": data, "padding": "plan", "max_steps": STEPS, "lr_scheduler": "constant"}
    from_all = {"resume": True, "from": (str(directory / "all"), f"checkpoint-{SAVED_AT}")}
    wishes: dict[str, dict[str, Any]] = {
        "none": {"plan": target_of("none")},
        "optimizer": {"plan": target_of("optimizer")},
        "all": {"plan": target_of("all"), "save_steps": SAVED_AT},
        "resumed": {"plan": target_of("all"), **from_all},
        "resumed on the cards": {"plan": target_of("none"), **from_all},
        "from files": {"plan": target_of("none"), "init": str(directory / "none" / "model")},
        "from files, offloaded": {"plan": target_of("all"), "init": str(directory / "none" / "model")},
        "none, bf16": {"plan": in_bf16("none")},
        "all, bf16": {"plan": in_bf16("all")},
        "full disk": {"plan": target_of("none"), "save_steps": 1, "full": "first"},
    }
    every = {name: {**common, "output_dir": directory / name, **wish} for name, wish in wishes.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        return directory, on_ranks(2, several.run_all, plan=plan_on("zero3", 2).model_dump_json(), runs=every)


Runs = tuple[Path, list[dict[str, str]]]


@pytest.mark.parametrize("offload", ["none", "optimizer", "all"])
def test_wherever_states_lie_losses_and_weights_are_those_of_one_process(offload: str, runs: Runs, alone: Path) -> None:
    run = runs[0] / offload
    assert len(losses(run)) == STEPS
    torch.testing.assert_close(losses(run), losses(alone), rtol=1e-5, atol=0)
    torch.testing.assert_close(weights(run), weights(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("resumed", ["resumed", "resumed on the cards"])
def test_a_run_with_all_offloaded_goes_on_in_the_middle_of_a_visit(resumed: str, runs: Runs) -> None:
    directory, _ = runs
    assert losses(directory / resumed) == losses(directory / "all")[SAVED_AT:]
    torch.testing.assert_close(weights(directory / resumed), weights(directory / "all"), rtol=0, atol=0)


@pytest.mark.parametrize("run", ["from files", "from files, offloaded"])
def test_weights_that_are_read_are_those_of_one_process(run: str, runs: Runs, tmp_path: Path) -> None:
    directory, _ = runs
    init = str(directory / "none" / "model")
    run_tiny(plan_on("single", 1), tmp_path, padding="plan", max_steps=STEPS, lr_scheduler="constant", init=init)
    torch.testing.assert_close(losses(directory / run), losses(tmp_path / "run"), rtol=1e-5, atol=0)
    torch.testing.assert_close(weights(directory / run), weights(tmp_path / "run"), rtol=0, atol=1e-5)


def test_stochastic_rounding_is_the_same_where_the_copies_lie_on_the_host(runs: Runs) -> None:
    found, expected = (weights(runs[0] / name) for name in ("all, bf16", "none, bf16"))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_what_deepspeed_holds_is_measured_by_name(runs: Runs) -> None:
    measured = json.loads((runs[0] / "all" / "measured.json").read_text())["measurement"]["by_category"]
    weights_of_both = sum(tensor.nbytes for tensor in weights(runs[0] / "all").values())
    assert measured["parameter"] == pytest.approx(weights_of_both / 2, rel=0.02)
    assert measured["gradient"] == 2 * measured["master"] > 0
    assert measured["optimizer state"] == pytest.approx(2 * measured["master"], rel=0.01)


def test_a_disk_that_is_full_for_the_first_process_ends_both_and_leaves_the_checkpoint_before(runs: Runs) -> None:
    directory = runs[0] / "full disk"
    messages = [errors["full disk"] for errors in runs[1]]
    assert messages[0] == messages[1]
    assert "checkpoint of step 2 could not be written: OSError: [Errno 28] No space left on device, for " in messages[0]
    assert "state.pt, which takes " in messages[0]
    assert " are free" in messages[0]
    assert [path.name for path in directory.glob("*checkpoint*")] == ["checkpoint-1"]
    assert is_whole(directory / "checkpoint-1")
    assert not list(directory.glob(".*.partial"))
    assert all(set(errors) == {"full disk"} for errors in runs[1])

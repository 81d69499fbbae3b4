"""badam-train in two processes: everything that a run has in one, and the same figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from badam.plan import Partition, Plan
from badam.training.run_directory import is_whole
from tests.badam.distributed.workers import JobFailedError, on_ranks
from tests.badam.training import several
from tests.badam.training.tiny import CONFIG, LAYERS, records, run_tiny, tiny_plan, write_jsonl

STEPS, SAVED_AT = 6, 3  # visits have two steps, so the checkpoint is in the middle of one
CLASSIFIER = {"config": {**CONFIG, "num_labels": 2}, "task": "sequence-classification"}
LABELLED = [{"text": "sun moon star"[: 3 + index % 9], "label": index % 2} for index in range(24)]
EVALUATED: dict[str, Any] = {"eval_share": 0.25, "eval_steps": SAVED_AT, "save_steps": SAVED_AT}


def plan_on(engine: str, cards: int, **changes: Any) -> Plan:
    """A plan in fp32 with a global batch of four, of two micro-batches for one or two cards."""
    plan = tiny_plan(
        training={"dtype": "float32", "batch_size": 2 // cards, "grad_accum": 2},
        optimizer={"learning_rate": 1e-3},
        **changes,
    )
    target = {"engine": engine, "num_gpus": cards}
    return plan.model_copy(update={"target": plan.target.model_copy(update=target)})


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("alone")
    run_tiny(plan_on("single", 1), directory, padding="plan", max_steps=STEPS, lr_scheduler="constant", **EVALUATED)
    return directory / "run"


@pytest.fixture(scope="module", params=["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """The directory of all runs of an engine, and their errors in each process."""
    directory = tmp_path_factory.mktemp(request.param)
    data = str(write_jsonl(directory / "data.jsonl", records()))
    common: dict[str, Any] = {"data": data, "padding": "plan", "max_steps": STEPS, "lr_scheduler": "constant"}
    wishes: dict[str, dict[str, Any]] = {
        "whole": EVALUATED,
        "resumed": {**EVALUATED, "resume": True, "from": (str(directory / "whole"), f"checkpoint-{SAVED_AT}")},
        "stopped": {"stop": 2},
        "best": {**EVALUATED, "save_steps": 1, "eval_steps": 1, "keep_best": True, "patience": 1, "keep": 1},
        "classes": {},
        "adapting": {"adapt": True},
        "full disk": {"save_steps": 1, "full": True},
        "of one process": {"resume": True, "from": (str(directory), "checkpoint-1")},
    }
    (directory / "checkpoint-1").mkdir()
    (directory / "checkpoint-1" / "files.json").write_text("{}")
    every = {name: {**common, "output_dir": directory / name, **wish} for name, wish in wishes.items()}
    plan = plan_on(request.param, 2).model_dump_json()
    # A rate at which the second evaluation is worse than the first.
    every["best"]["plan"] = {"training": worsening(json.loads(plan)["training"])}
    every["classes"] |= {"data": str(write_jsonl(directory / "classes.jsonl", LABELLED)), **EVALUATED}
    classes = json.loads(plan_on(request.param, 2, model=CLASSIFIER, partition=with_head()).model_dump_json())
    every["classes"]["plan"] = {name: classes[name] for name in ("model", "partition")}
    return directory, on_ranks(2, several.run_all, plan=plan, runs=every)


def with_head() -> Partition:
    """Blocks by layer, and the classifier's head in every visit."""
    return tiny_plan().partition.model_copy(update={"active_modules": ("score",)})


def worsening(training: dict[str, Any]) -> dict[str, Any]:
    return {**training, "optimizer": {**training["optimizer"], "learning_rate": 10.0}}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(directory: Path) -> list[float]:
    return [line["loss"] for line in lines(directory / "metrics.jsonl")]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "model" / "model.safetensors")


Runs = tuple[Path, list[dict[str, str]]]


def test_losses_evaluations_and_weights_are_those_of_one_process(runs: Runs, alone: Path) -> None:
    whole = runs[0] / "whole"
    torch.testing.assert_close(losses(whole), losses(alone), rtol=1e-5, atol=0)
    torch.testing.assert_close(weights(whole), weights(alone), rtol=0, atol=1e-5)
    found, expected = (lines(path / "evaluations.jsonl") for path in (whole, alone))
    assert [each["step"] for each in found] == [SAVED_AT, STEPS]
    torch.testing.assert_close(found[1]["loss"], expected[1]["loss"], rtol=1e-5, atol=0)


def test_a_run_that_was_resumed_within_a_visit_has_the_same_losses_and_weights(runs: Runs) -> None:
    directory, _ = runs
    assert losses(directory / "resumed") == losses(directory / "whole")[SAVED_AT:]
    torch.testing.assert_close(weights(directory / "resumed"), weights(directory / "whole"), rtol=0, atol=0)


def test_every_card_is_measured_and_the_worst_one_is_shown(runs: Runs) -> None:
    measured = json.loads((runs[0] / "whole" / "measured.json").read_text())
    peaks = [gpu["peak_allocated_bytes"] for gpu in measured["cards"]]
    assert [gpu["rank"] for gpu in measured["cards"]] == [0, 1]
    assert measured["measurement"]["peak_allocated_bytes"] == max(peaks)


def test_a_signal_to_one_process_saves_and_ends_all_of_them(runs: Runs) -> None:
    stopped = runs[0] / "stopped"
    assert is_whole(stopped / "checkpoint-2")
    assert len(losses(stopped)) == 2
    assert not (stopped / "model").exists()


def test_the_best_checkpoint_is_kept_and_training_stops_when_it_is_past(runs: Runs) -> None:
    best = runs[0] / "best"
    found = [each["loss"] for each in lines(best / "evaluations.jsonl")]
    assert len(found) < STEPS, "it stopped early"
    step = 1 + found.index(min(found))
    assert {path.name for path in best.glob("checkpoint-*")} == {f"checkpoint-{step}", f"checkpoint-{len(found)}"}
    assert (best / "model" / "model.safetensors").exists()


def test_what_processes_cannot_do_together_is_refused_by_all_of_them_in_a_sentence(runs: Runs) -> None:
    first, second = runs[1]
    assert set(first) == set(second) == {"adapting", "of one process", "full disk"}
    assert "--adapt among several processes" in first["adapting"]
    assert "was written by one process" in first["of one process"]
    assert second["of one process"] == "ended with 2"
    assert not list(runs[0].glob("*/.*.partial"))


def test_a_disk_that_is_full_for_one_process_ends_all_of_them_with_the_reason(runs: Runs) -> None:
    for errors in runs[1]:
        assert "checkpoint of step 1 could not be written: process 1 could not write its part" in errors["full disk"]
        assert "No space left on device" in errors["full disk"]
    assert not list((runs[0] / "full disk").glob("*checkpoint*"))


def test_a_process_that_fails_alone_in_a_checkpoint_leaves_nobody_waiting(tmp_path: Path) -> None:
    data = str(write_jsonl(tmp_path / "data.jsonl", records()))
    settings = {"data": data, "output_dir": tmp_path / "run", "max_steps": 2, "save_steps": 1}
    with pytest.raises(JobFailedError) as caught:
        on_ranks(2, several.fail_alone, plan=plan_on("ddp", 2).model_dump_json(), settings=settings)
    first, second = caught.value.errors
    assert "checkpoint of step 1 could not be written: [Errno 28] No space left" in first
    assert "lost another one" in second
    assert not list((tmp_path / "run").glob("*checkpoint*"))


def test_a_classifier_is_trained_and_evaluated_by_two_processes_as_by_one(runs: Runs, tmp_path: Path) -> None:
    plan = plan_on("single", 1, model=CLASSIFIER, partition=with_head())
    data = str(runs[0] / "classes.jsonl")
    run_tiny(plan, tmp_path, data=data, padding="plan", max_steps=STEPS, lr_scheduler="constant", **EVALUATED)
    together, alone = runs[0] / "classes", tmp_path / "run"
    torch.testing.assert_close(losses(together), losses(alone), rtol=1e-5, atol=0)
    found, expected = (lines(path / "evaluations.jsonl") for path in (together, alone))
    assert [each["accuracy"] for each in found] == [each["accuracy"] for each in expected]


@pytest.mark.slow
def test_copies_that_are_cut_train_like_one_process_and_go_on_in_another_layout(tmp_path: Path) -> None:
    visits = {"switch_every": 3, "switch_mode": "random"}
    steps, saved_at = 3 * 3 * LAYERS, 2 * 3 * LAYERS - 1
    plan = plan_on("single", 1, schedule=visits)
    plan = plan.model_copy(update={"training": plan.training.model_copy(update={"batch_size": 4})})
    common: dict[str, Any] = {"padding": "plan", "max_steps": steps, "lr_scheduler": "constant"}
    run_tiny(plan, tmp_path, **common)
    target = plan.target.model_copy(update={"engine": "fsdp2", "num_gpus": 4, "shard_size": 2})
    training = plan.training.model_copy(update={"batch_size": 1})
    cut = plan.model_copy(update={"target": target, "training": training}).model_dump_json()
    common["data"] = str(tmp_path / "data.jsonl")
    four = {**common, "output_dir": tmp_path / "four", "save_steps": saved_at}
    assert on_ranks(4, several.run_all, plan=cut, runs={"four": four}) == [{}] * 4
    two = {**common, "output_dir": tmp_path / "two", "resume": True}
    two["from"] = (str(tmp_path / "four"), f"checkpoint-{saved_at}")
    assert on_ranks(2, several.run_all, plan=cut, runs={"two": two}) == [{}] * 2
    torch.testing.assert_close(losses(tmp_path / "four"), losses(tmp_path / "run"), rtol=1e-5, atol=0)
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "run")[saved_at:], rtol=1e-5, atol=0)
    for name in ("four", "two"):
        torch.testing.assert_close(weights(tmp_path / name), weights(tmp_path / "run"), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_processes_among_which_rows_do_not_divide_read_their_parts_and_train_like_one(tmp_path: Path) -> None:
    plan = plan_on("single", 1)
    plan = plan.model_copy(update={"training": plan.training.model_copy(update={"batch_size": 3})})
    run_tiny(plan, tmp_path, output="before", max_steps=1)
    common: dict[str, Any] = {"padding": "plan", "max_steps": STEPS, "lr_scheduler": "constant"}
    common |= {"init": str(tmp_path / "before" / "model")}
    run_tiny(plan, tmp_path, **common)
    target = plan.target.model_copy(update={"engine": "fsdp2", "num_gpus": 3})
    training = plan.training.model_copy(update={"batch_size": 1})
    three = plan.model_copy(update={"target": target, "training": training}).model_dump_json()
    common |= {"data": str(tmp_path / "data.jsonl"), "output_dir": tmp_path / "three"}
    assert on_ranks(3, several.run_all, plan=three, runs={"three": common}) == [{}] * 3
    torch.testing.assert_close(losses(tmp_path / "three"), losses(tmp_path / "run"), rtol=1e-5, atol=0)
    torch.testing.assert_close(weights(tmp_path / "three"), weights(tmp_path / "run"), rtol=0, atol=1e-5)

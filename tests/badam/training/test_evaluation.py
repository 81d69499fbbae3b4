"""Data that is not trained on: evaluated during the run, and deciding which weights the run ends with."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from badam import phases
from badam.errors import InputError
from badam.training import trainer as trainer_module
from badam.training.evaluation import Evaluation, evaluate
from badam.vocabulary import Phase
from tests.badam.training.test_methods import plan_for
from tests.badam.training.tiny import records, run_tiny, tiny_plan, write_jsonl


def lines(directory: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / name).read_text(encoding="utf-8").splitlines()]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(directory).state_dict())


def given_losses(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Evaluations find these losses, one after the other."""
    left = iter(losses)
    monkeypatch.setattr(trainer_module, "evaluate", lambda *_: Evaluation(next(left), 1))


def test_the_loss_is_the_mean_over_all_labels_whatever_the_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What transformers finds for one example after the other, weighted by their label tokens."""
    seen = []

    def noted(model: Any, dataset: Any, *others: Any) -> Evaluation:
        seen.append(dataset)
        return evaluate(model, dataset, *others)

    monkeypatch.setattr(trainer_module, "evaluate", noted)
    held_out = write_jsonl(tmp_path / "eval.jsonl", records(5))
    plan = tiny_plan(training={"dtype": "float32"}, optimizer={"learning_rate": 1e-12})
    run_tiny(plan, tmp_path, max_steps=1, eval_data=str(held_out), eval_steps=1)
    (found,) = lines(tmp_path / "run", "evaluations.jsonl")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model", dtype=torch.float32)
    total = count = 0.0
    for row in seen[0]:
        ids, labels = torch.tensor([row["input_ids"][:16]]), torch.tensor([row["labels"][:16]])
        labelled = int((labels[:, 1:] != -100).sum())
        total += model(input_ids=ids, labels=labels).loss.item() * labelled
        count += labelled
    assert count < sum(len(row["labels"]) for row in seen[0])
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)


def test_an_evaluation_changes_nothing_of_the_training(tmp_path: Path) -> None:
    plan = tiny_plan(checkpointed=True, training={"loss": "chunked"})
    run_tiny(plan, tmp_path, output="plain")
    held_out = write_jsonl(tmp_path / "eval.jsonl", records(7))
    evaluated, printed = run_tiny(plan, tmp_path, output="evaluated", eval_data=str(held_out), eval_steps=2)
    for name in ("loss", "gradient_norm", "learning_rate", "block"):
        plain = [line[name] for line in lines(tmp_path / "plain", "metrics.jsonl")]
        assert [line[name] for line in lines(tmp_path / "evaluated", "metrics.jsonl")] == plain
    assert [line["step"] for line in lines(tmp_path / "evaluated", "evaluations.jsonl")] == [2, 4]
    assert "evaluation after step 4" in printed
    assert evaluated.measured.measurement.steps == 4


def test_a_share_of_the_data_is_held_out_and_never_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {}

    def noted(_model: Any, dataset: Any, *_: Any) -> Evaluation:
        sizes["held out"] = len(dataset)
        return Evaluation(1.0, 1)

    monkeypatch.setattr(trainer_module, "evaluate", noted)
    _, printed = run_tiny(tiny_plan(), tmp_path, eval_share=0.25, max_steps=None, epochs=1)
    assert sizes["held out"] == 6
    assert len(lines(tmp_path / "run", "metrics.jsonl")) == 9  # the other 18 in batches of two
    assert "6 of them held out" in printed
    assert [line["step"] for line in lines(tmp_path / "run", "evaluations.jsonl")] == [9]  # once per epoch


@pytest.mark.parametrize("method", ["badam", "badam-ratio", "lora"])
def test_the_run_ends_with_the_weights_of_its_best_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    given_losses(monkeypatch, [3.0, 2.0, 4.0])
    plan = plan_for(method)
    result, _ = run_tiny(plan, tmp_path, eval_share=0.25, eval_steps=2, keep_best=True, keep=1, max_steps=6)
    assert result.best is not None
    assert (result.best.step, result.best.figure) == (4, 2.0)
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    best = weights(tmp_path / "run/model")
    if method != "lora":  # whose checkpoints hold adapters apart from the weights
        saved = weights(tmp_path / "run/checkpoint-4")
        last = weights(tmp_path / "run/checkpoint-6")
        assert all(torch.equal(best[name], saved[name]) for name in best)
        assert not all(torch.equal(best[name], last[name]) for name in best)
    assert not any("lora" in name for name in best)


def test_a_resumed_run_remembers_its_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given_losses(monkeypatch, [2.0, 3.0, 4.0])
    options: dict[str, Any] = {"eval_share": 0.25, "eval_steps": 2, "keep_best": True}
    run_tiny(tiny_plan(), tmp_path, max_steps=4, **options)
    shutil.rmtree(tmp_path / "run/model")
    (tmp_path / "run").rename(tmp_path / "moved")
    result, _ = run_tiny(tiny_plan(), tmp_path, output="moved", max_steps=6, resume=True, **options)
    assert result.best is not None
    assert result.best.step == 2
    best, first = weights(tmp_path / "moved/model"), weights(tmp_path / "moved/checkpoint-2")
    assert all(torch.equal(best[name], first[name]) for name in best)


def test_a_run_without_progress_stops_when_patience_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given_losses(monkeypatch, [1.0, 2.0, 3.0, 4.0, 5.0])
    result, _ = run_tiny(tiny_plan(), tmp_path, eval_share=0.25, eval_steps=1, keep_best=True, patience=2, max_steps=5)
    assert result.step == 3


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given_losses(monkeypatch, [math.nan, 2.0])
    result, _ = run_tiny(tiny_plan(), tmp_path, eval_share=0.25, eval_steps=1, keep_best=True, max_steps=2)
    assert result.best is not None
    assert result.best.step == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_steps": 2}, "--eval-steps needs evaluation data"),
        ({"keep_best": True}, "--best needs evaluation data"),
        ({"eval_share": 0.5, "patience": 1}, "needs --best"),
        ({"eval_share": 0.5, "keep_best": True, "eval_steps": 2, "save_steps": 3}, "--save-steps 3 is not a multiple"),
        ({"eval_share": 0.5, "eval_data": "x.jsonl"}, "two kinds of evaluation data"),
        ({"eval_share": 0.001}, "holds out 0"),
        ({"warmup_steps": 1, "warmup_share": 0.1}, "given twice"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_tiny(tiny_plan(), tmp_path, **options)


def test_evaluation_data_of_another_form_is_refused(tmp_path: Path) -> None:
    held_out = write_jsonl(tmp_path / "eval.jsonl", [{"text": "plain"}])
    with pytest.raises(InputError, match=r"holds prompt-completion, .* holds text"):
        run_tiny(tiny_plan(), tmp_path, eval_data=str(held_out))


def test_phases_of_what_is_no_step_are_told_to_nobody() -> None:
    heard = []
    with phases.listening(lambda _, phase: heard.append(phase)):
        phases.enter(Phase.STEP)
        with phases.unannounced():
            phases.enter(Phase.LOSS)
        assert phases.current() is Phase.STEP
        phases.enter(Phase.SETUP)
    assert heard == [Phase.STEP, Phase.SETUP]


def test_the_warm_up_can_be_a_share_of_the_run(tmp_path: Path) -> None:
    run_tiny(tiny_plan(optimizer={"learning_rate": 0.01}), tmp_path, max_steps=8, warmup_share=0.5)
    rates = [line["learning_rate"] for line in lines(tmp_path / "run", "metrics.jsonl")]
    assert rates.index(max(rates)) == 4
    assert rates[4] == 0.01


def test_packed_rows_hold_whole_examples_within_the_plans_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from badam.training.data import inputs as preparing

    rows = []
    original = preparing.pack

    def noted(dataset: Any, limit: int) -> Any:
        packed = original(dataset, limit)
        rows.append((dataset["input_ids"], packed["input_ids"], packed["labels"]))
        return packed

    monkeypatch.setattr(preparing, "pack", noted)
    _, printed = run_tiny(tiny_plan(training={"seq_len": 48}), tmp_path, pack=True, max_steps=2)
    ((examples, packed, labels),) = rows
    assert len(packed) < len(examples)
    assert max(map(len, packed)) <= 48
    assert [len(row) for row in packed] == [len(row) for row in labels]
    assert sum(map(len, packed)) == sum(map(len, examples))  # nothing was cut: all are shorter
    joined = [" ".join(map(str, row)) for row in packed]
    assert all(any(" ".join(map(str, example)) in row for row in joined) for example in examples)
    assert f"packed into {len(packed)} rows" in printed

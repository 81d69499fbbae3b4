"""Classification under a plan: labelled records in, a model that transformers can load out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from badam.errors import DataError, InputError
from badam.plan import BlockPlan, Partition, Plan
from badam.training import step as step_module
from badam.training import trainer as trainer_module
from badam.training.data.formats import CLASS_FORMATS, detect
from tests.badam.training.tiny import run_tiny, tiny_plan, write_jsonl

LAYERS = 3
ROBERTA: dict[str, Any] = {
    "model_type": "roberta", "architectures": ["RobertaForSequenceClassification"], "vocab_size": 320,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1, "num_labels": 3,
}  # fmt: skip
ANSWERS = ["entailment", "contradiction", "neutral"]


def entailments(count: int = 24) -> list[dict[str, Any]]:
    """Premises whose first word decides the answer."""
    return [
        {"premise": f"{'abc'[index % 3] * 3} rain {'falls ' * (index % 5)}", "hypothesis": "it is wet",
         "label": ANSWERS[index % 3]}
        for index in range(count)
    ]  # fmt: skip


def classification_plan(**changes: Any) -> Plan:
    """Blocks by layer of a tiny RoBERTa, with the head active in all of them."""
    blocks = tuple(
        BlockPlan(name=f"layer {index}", prefixes=(f"roberta.encoder.layer.{index}",), parameters=1)
        for index in range(LAYERS)
    )
    return tiny_plan(
        model={"config": ROBERTA, "task": "sequence-classification"},
        training={"seq_len": 24, "batch_size": 4, **changes.pop("training", {})},
        partition=Partition(strategy="layer", blocks=blocks, active_modules=("classifier",)),
        **changes,
    )


def run(tmp_path: Path, rows: list[dict[str, Any]] | None = None, **options: Any) -> Any:
    write_jsonl(tmp_path / "data.jsonl", entailments() if rows is None else rows)
    plan = options.pop("plan", None) or classification_plan()
    return run_tiny(plan, tmp_path, **options)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForSequenceClassification.from_pretrained(directory).state_dict())


def metrics(directory: Path, name: str) -> list[Any]:
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)[name] for line in lines]


def test_the_model_names_its_classes_and_learns_them(tmp_path: Path) -> None:
    plan = classification_plan(
        training={"dtype": "float32"}, optimizer={"learning_rate": 5e-3}, schedule={"switch_every": 10}
    )
    result, printed = run(
        tmp_path,
        plan=plan,
        max_steps=60,
        eval_data=str(tmp_path / "data.jsonl"),
        eval_steps=60,
        lr_scheduler="constant",
    )
    (line,) = (tmp_path / "run/evaluations.jsonl").read_text().splitlines()
    assert json.loads(line)["accuracy"] == 1.0
    assert "accuracy 100.0%" in printed
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert model.config.id2label == dict(enumerate(sorted(ANSWERS)))
    row = entailments(1)[0]
    inputs = tokenizer(row["premise"].strip(), row["hypothesis"], return_tensors="pt", return_token_type_ids=False)
    assert model.config.id2label[int(model(**inputs).logits.argmax())] == row["label"]
    assert result.measured.measurement.steps == 60


def test_the_head_is_trained_in_every_visit_and_other_layers_are_not(tmp_path: Path) -> None:
    run(tmp_path, max_steps=3, save_steps=1)
    first, third = weights(tmp_path / "run/checkpoint-1"), weights(tmp_path / "run/checkpoint-3")
    changed = {name for name in first if not torch.equal(first[name], third[name])}
    assert {name.split(".")[0] for name in changed} == {"roberta", "classifier"}
    assert not any("layer.2" in name or "embeddings" in name for name in changed)


def test_the_loss_of_accumulated_micro_batches_is_the_mean_over_examples(tmp_path: Path) -> None:
    for name, sizes in (("one", {"batch_size": 4}), ("two", {"batch_size": 2, "grad_accum": 2})):
        plan = classification_plan(training={"dtype": "float32", **sizes})
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = plan.model.model_copy(update={"config": {**ROBERTA, **no_dropout}})
        run(tmp_path, plan=plan.model_copy(update={"model": model}), output=name, max_steps=3)
    for figure in ("loss", "gradient_norm"):
        assert metrics(tmp_path / "two", figure) == pytest.approx(metrics(tmp_path / "one", figure), rel=1e-4)


def test_a_resumed_classification_goes_on_bit_for_bit(tmp_path: Path) -> None:
    run(tmp_path, output="whole", max_steps=6, save_steps=3)
    run(tmp_path, output="parts", max_steps=3, save_steps=3, lr_scheduler="constant")
    run(tmp_path, output="again", max_steps=6, save_steps=3, lr_scheduler="constant")
    run(tmp_path, output="parts", max_steps=6, resume=True, lr_scheduler="constant")
    assert metrics(tmp_path / "parts", "loss") == metrics(tmp_path / "again", "loss")


def test_long_texts_are_cut_at_the_longer_part_and_special_tokens_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = step_module.train_step

    def noted(plan: Any, method: Any, model: Any, optimizer: Any, next_batch: Any, **options: Any) -> Any:
        def noted_batch() -> Any:
            batch, num_items = next_batch()
            seen.append({name: tensor.clone() for name, tensor in batch.items()})
            return batch, num_items

        return original(plan, method, model, optimizer, noted_batch, **options)

    monkeypatch.setattr(trainer_module, "train_step", noted)
    rows = [{"premise": "rain " * 100, "hypothesis": "wet", "label": index % 2} for index in range(4)]
    _, printed = run(tmp_path, rows, max_steps=1)
    assert seen[0]["input_ids"].shape == (4, 24)
    assert "4 (100.0%) are longer than the plan's 24" in printed
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert tokenizer.decode(seen[0]["input_ids"][0]).endswith("wet")


def test_padding_is_hidden_by_a_mask(tmp_path: Path) -> None:
    """A longer batch has the same loss."""
    for name, padding in (("plan", "plan"), ("longest", "longest")):
        plan = classification_plan(training={"dtype": "float32"})
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = plan.model.model_copy(update={"config": {**ROBERTA, **no_dropout}})
        run(tmp_path, plan=plan.model_copy(update={"model": model}), output=name, max_steps=2, padding=padding)
    assert metrics(tmp_path / "plan", "loss") == pytest.approx(metrics(tmp_path / "longest", "loss"), rel=1e-4)


@pytest.mark.parametrize("known", CLASS_FORMATS, ids=lambda known: known.name)
def test_every_schema_becomes_one_text_or_two(known: Any) -> None:
    row = {column: f"<{column}>" for column in known.needed} | {"label": 1}
    assert detect(row.keys(), source="x", classes=True) is known
    converted = known.convert(row, False)
    assert converted["label"] == "1"
    shown = converted["text"] + converted.get("pair", "")
    assert all(f"<{column}>" in shown for column in known.needed if column != "label")
    assert known.convert({**row, "label": -1}, False) is None


def test_labels_may_be_truth_values_numbers_or_names(tmp_path: Path) -> None:
    for name, values in (("truth", [True, False]), ("numbers", [0, 1]), ("names", ["no", "yes"])):
        rows = [{"question": "is it", "passage": f"it is {index}", "label": values[index % 2]} for index in range(4)]
        result, _ = run(tmp_path, rows, output=name, max_steps=1)
        assert result.model_path is not None


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        ([{"text": "a", "label": str(index)} for index in range(5)], {}, DataError, "5 classes .* has 3"),
        ([{"text": "a", "label": 1.5}], {}, DataError, "label is 1.5, not the number or name"),
        ([{"text": "a"}], {}, DataError, "none of the known formats fits"),
        ([{"text": "a", "label": 1}] * 4, {"pack": True}, InputError, "cannot be packed"),
        (None, {"data": "stdlib-docstrings"}, InputError, "has no classes"),
    ],
)
def test_what_cannot_be_classified_is_told(
    tmp_path: Path, rows: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(tmp_path, rows, **options)


def test_a_class_that_only_the_evaluation_has_is_told(tmp_path: Path) -> None:
    odd = write_jsonl(tmp_path / "odd.jsonl", [{"premise": "a", "hypothesis": "b", "label": "maybe"}])
    with pytest.raises(DataError, match="has the class 'maybe'"):
        run(tmp_path, eval_data=str(odd), eval_steps=1)

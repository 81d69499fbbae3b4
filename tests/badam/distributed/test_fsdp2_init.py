"""Models of which each process builds its part, against the same models built by one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from badam.plan import ModelSpec, Training
from badam.training.build import build_model, choose_attention
from tests.badam.distributed import fsdp2_init_jobs as cut_jobs
from tests.badam.distributed.workers import on_ranks
from tests.badam_planner.rehearsal.plans import DEBERTA, GEMMA2, GPT2, LLAMA, MODERNBERT, QWEN3_MOE, ROBERTA, spec_of

TIED = {**LLAMA, "tie_word_embeddings": True}
CLASSIFIER = "sequence-classification"
FEW: dict[str, ModelSpec] = {"llama": spec_of(LLAMA, 3), "tied": spec_of(TIED, 2), "gpt2": spec_of(GPT2, 2)}
MORE: dict[str, ModelSpec] = {
    "gemma2": spec_of(GEMMA2, 2),
    "experts": spec_of(QWEN3_MOE, 2),
    **{
        name: spec_of(config, 2).model_copy(update={"task": CLASSIFIER})
        for name, config in {"roberta": ROBERTA, "deberta": DEBERTA, "modernbert": MODERNBERT}.items()
    },
}


def training_of(spec: ModelSpec) -> Training:
    return Training(batch_size=1, seq_len=8, attention=choose_attention(spec))


def settings_of(spec: ModelSpec, weights: Path | None = None) -> dict[str, Any]:
    training = training_of(spec).model_dump_json()
    return {"spec": spec.model_dump_json(), "training": training, "weights": weights and str(weights)}


def saved(spec: ModelSpec, directory: Path) -> Path:
    torch.manual_seed(11)
    build_model(spec, training_of(spec)).save_pretrained(directory)
    return directory


def random_and_saved(specs: dict[str, ModelSpec], directory: Path) -> dict[str, dict[str, Any]]:
    models = {name: settings_of(spec) for name, spec in specs.items()}
    return models | {
        f"{name}, pretrained": settings_of(spec, saved(spec, directory / name)) for name, spec in specs.items()
    }


def assert_built_as_by_one_process(settings: dict[str, Any], results: list[dict[str, Any]]) -> None:
    expected = cut_jobs.alone(**settings)
    for found in results:
        for what in ("weights", "buffers", "drawn"):
            torch.testing.assert_close(found[what], expected[what], rtol=0, atol=0)
        assert found["names"] == expected["names"]


Results = tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What was asked of three processes, among which rows do not divide, and what each of them found."""
    directory = tmp_path_factory.mktemp("weights")
    models = random_and_saved(FEW, directory)
    headless = FEW["llama"].model_copy(update={"task": CLASSIFIER})
    models["classifier without a head"] = settings_of(headless, directory / "llama")
    models["few experts"] = settings_of(MORE["experts"], saved(MORE["experts"], directory / "experts"))
    two = saved(FEW["tied"], directory / "two") / "model.safetensors"
    tensors = load_file(two)
    tensors["lm_head.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, two, {"format": "pt"})
    models["two for one"] = settings_of(FEW["tied"], two.parent)
    asked = {name: {**settings, "shard_size": 3} for name, settings in models.items()}
    return models, on_ranks(3, cut_jobs.every_one, models=asked)


@pytest.mark.parametrize("kind", ["", ", pretrained"])
@pytest.mark.parametrize("name", FEW)
def test_each_process_builds_its_part_of_what_one_process_builds(name: str, kind: str, results: Results) -> None:
    models, found = results
    each = [one[name + kind] for one in found]
    assert_built_as_by_one_process(models[name + kind], each)
    assert not any(one["built whole"] for one in each)


def test_a_head_that_the_checkpoint_lacks_is_initialized_alike_everywhere(results: Results) -> None:
    models, found = results
    name = "classifier without a head"
    assert_built_as_by_one_process(models[name], [one[name] for one in found])


def test_where_a_process_would_have_no_expert_the_model_is_built_whole(results: Results) -> None:
    models, found = results
    assert_built_as_by_one_process(models["few experts"], [one["few experts"] for one in found])
    assert all(one["few experts"]["built whole"] for one in found)


def test_two_tensors_for_what_the_model_shares_are_refused(results: Results) -> None:
    for one in results[1]:
        assert "have two tensors for model.embed_tokens.weight and lm_head.weight" in one["two for one"]["refused"]


def test_where_a_layer_is_initialized_from_outside_the_model_is_built_whole() -> None:
    settings = settings_of(FEW["llama"])
    del settings["weights"]
    for found, expected in on_ranks(2, cut_jobs.meddling, **settings, shard_size=2):
        assert found["built whole"]
        torch.testing.assert_close(found["weights"], expected["weights"], rtol=0, atol=0)


@pytest.mark.slow
def test_other_architectures_and_copies_are_built_in_parts_too(tmp_path: Path) -> None:
    models = random_and_saved(MORE, tmp_path)
    found = on_ranks(
        4, cut_jobs.every_one, models={name: {**settings, "shard_size": 2} for name, settings in models.items()}
    )
    for name, settings in models.items():
        assert_built_as_by_one_process(settings, [one[name] for one in found])
        assert not any(one[name]["built whole"] for one in found)


@pytest.mark.slow
def test_no_process_holds_more_than_its_part_and_some_layers(tmp_path: Path) -> None:
    spec = spec_of({**LLAMA, "hidden_size": 256, "intermediate_size": 640, "vocab_size": 128}, 16)
    build_model(spec, training_of(spec)).half().save_pretrained(tmp_path)  # read in another type than it is mapped in
    models = {"random": settings_of(spec), "pretrained": settings_of(spec, tmp_path)}
    mapped = {"random": 0, "pretrained": (tmp_path / "model.safetensors").stat().st_size}
    asked = {name: {**settings, "shard_size": 2} for name, settings in models.items()}
    for found in on_ranks(2, cut_jobs.highest_bytes, models=asked):
        for name in models:
            in_parts, whole = found[f"{name}, in parts"], found[f"{name}, whole"]
            assert in_parts["peak"] - mapped[name] < in_parts["part"] + 2.5 * in_parts["layer"]
            assert whole["peak"] - mapped[name] >= 2 * whole["part"]

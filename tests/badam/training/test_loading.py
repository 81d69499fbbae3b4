"""Weights are read by the names that they were saved under, and those of another model are refused."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from badam.errors import InputError
from badam.plan import ModelSpec, Plan, config_digest
from badam.training.build import build_model, prepare_model
from badam.training.loading import load_saved_weights
from benchmarks.tiny_configs import tiny
from tests.badam.training.test_methods import plan_for
from tests.badam.training.tiny import CONFIG, run_tiny, tiny_plan

SECONDS = 240


def plan_of_family(model_type: str, method: str = "adam") -> Plan:
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    default = AutoConfig.for_model(model_type).to_dict()
    config = tiny(model_type, default, names if isinstance(names, str) else names[0])
    spec = ModelSpec(id=model_type, source="config", config=config, config_digest=config_digest(config), parameters=1)
    plan = plan_for(method)
    training = plan.training.model_copy(update={"attention": "eager", "seq_len": 8})
    return plan.model_copy(update={"model": spec, "training": training})


def prepared_model(plan: Plan, seed: int) -> Any:
    torch.manual_seed(seed)
    model = build_model(plan.model, plan.training)
    prepare_model(model, plan)
    with torch.no_grad():
        for parameter in model.parameters():  # also those that begin as zeros or ones
            parameter.add_(torch.randn_like(parameter, dtype=torch.float32).to(parameter.dtype), alpha=0.1)
    return model


def read_again(plan: Plan, directory: Path) -> None:
    """Save a model of the plan, and read it into another one: the same objects, with equal contents."""
    saved, other = (prepared_model(plan, seed) for seed in (0, 1))
    saved.save_pretrained(directory)
    before = {name: id(tensor) for name, tensor in other.state_dict(keep_vars=True).items()}
    trained = {name for name, parameter in other.named_parameters() if parameter.requires_grad}
    load_saved_weights(other, directory)
    assert {name: id(tensor) for name, tensor in other.state_dict(keep_vars=True).items()} == before
    assert {name for name, parameter in other.named_parameters() if parameter.requires_grad} == trained
    state = other.state_dict()
    assert [name for name, tensor in saved.state_dict().items() if not torch.equal(tensor, state[name])] == []


@pytest.mark.parametrize("method", ["adam", "lora"])
@pytest.mark.parametrize("model_type", ["gpt_neox", "mixtral", "gemma3"])
def test_every_tensor_is_found_whatever_it_is_called_in_the_file(model_type: str, method: str, tmp_path: Path) -> None:
    read_again(plan_of_family(model_type, method), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_language_model_of_transformers_is_read_as_it_was_saved(model_type: str, tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.apply_async(_read_again_if_it_can_be_built, (model_type, tmp_path)).get(SECONDS)
    if found is not None:
        pytest.skip(found)


def _read_again_if_it_can_be_built(model_type: str, directory: Path) -> str | None:
    torch.set_num_threads(1)
    try:
        plan = plan_of_family(model_type)
        build_model(plan.model, plan.training)
    except Exception as error:  # whatever a configuration class or a missing library raises
        return f"{model_type} cannot be built tiny: {error}"
    read_again(plan, directory)
    return None


def test_a_checkpoint_without_one_of_the_tensors_is_refused_by_its_name(tmp_path: Path) -> None:
    plan = plan_of_family("mixtral")
    prepared_model(plan, 0).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("q_proj.weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"1 of \d+ tensors are not there \(.*q_proj.weight\)"):
        load_saved_weights(prepared_model(plan, 1), tmp_path)


def test_a_resumed_run_of_a_renamed_model_goes_on_bit_for_bit_and_ends_with_its_best_weights(tmp_path: Path) -> None:
    config = {**CONFIG, "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "num_key_value_heads": 4}
    spec = tiny_plan().model.model_copy(update={"config": config, "config_digest": config_digest(config)})
    plan = plan_for("badam-ratio")
    block = plan.partition.blocks[0].model_copy(update={"prefixes": ("gpt_neox", "embed_out")})
    partition = plan.partition.model_copy(update={"blocks": (block,)})
    plan = plan.model_copy(update={"model": spec, "partition": partition})
    shared: dict[str, Any] = {"save_steps": 2, "lr_scheduler": "constant", "eval_share": 0.2, "keep_best": True}
    run_tiny(plan, tmp_path, output="whole", max_steps=4, **shared)
    run_tiny(plan, tmp_path, output="parts", max_steps=2, **shared)
    run_tiny(plan, tmp_path, output="parts", max_steps=4, resume=True, **shared)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("whole", "parts")]
    states = [model.state_dict() for model in models]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pretrained")
    plan = tiny_plan()
    torch.manual_seed(3)
    build_model(plan.model, plan.training).save_pretrained(directory)
    run_tiny(plan, directory, max_steps=1)  # for its tokenizer
    for path in (directory / "run/model").glob("token*"):
        path.rename(directory / path.name)
    return directory


def changed(pretrained: Path, directory: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """A copy of the pretrained model with other tensors or another configuration."""
    directory.mkdir()
    for path in pretrained.glob("token*"):
        (directory / path.name).write_bytes(path.read_bytes())
    save_file(tensors or load_file(pretrained / "model.safetensors"), directory / "model.safetensors", {"format": "pt"})
    facts = json.loads((pretrained / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**facts, **config}))
    return directory


@pytest.mark.parametrize(
    ("prefix", "wrapper"), [("_orig_mod.", "torch.compile"), ("module.", "DistributedDataParallel")]
)
def test_the_mark_of_a_wrapper_is_taken_off_the_names_and_that_is_said(
    pretrained: Path, tmp_path: Path, prefix: str, wrapper: str
) -> None:
    tensors = load_file(pretrained / "model.safetensors")
    wrapped = changed(pretrained, tmp_path / "wrapped", {prefix + name: tensor for name, tensor in tensors.items()})
    said: list[str] = []
    plan = tiny_plan()
    model = build_model(plan.model, plan.training, weights=str(wrapped), tell=said.append)
    assert torch.equal(model.state_dict()["model.norm.weight"], tensors["model.norm.weight"])
    assert torch.equal(model.state_dict()["lm_head.weight"], tensors["lm_head.weight"])
    assert len(said) == 1
    assert wrapper in said[0]
    model.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved/model.safetensors").keys() == tensors.keys()


def test_names_of_another_kind_are_refused(pretrained: Path, tmp_path: Path) -> None:
    tensors = {f"net.{name}": tensor for name, tensor in load_file(pretrained / "model.safetensors").items()}
    other = changed(pretrained, tmp_path / "other", tensors)
    with pytest.raises(InputError, match=r"\d+ of \d+ tensors are missing \(lm_head.weight, .*it has net\.lm_head"):
        run_tiny(tiny_plan(), tmp_path, init=str(other))


def test_weights_of_another_type_of_model_are_refused_though_their_names_fit(pretrained: Path, tmp_path: Path) -> None:
    other = changed(pretrained, tmp_path / "other", model_type="mistral")
    with pytest.raises(InputError, match="those of a mistral model, and the plan is for a llama model"):
        run_tiny(tiny_plan(), tmp_path, init=str(other))


def test_an_adapter_alone_is_refused(pretrained: Path, tmp_path: Path) -> None:
    other = changed(pretrained, tmp_path / "other")
    (other / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds an adapter of PEFT"):
        run_tiny(tiny_plan(), tmp_path, init=str(other))


def test_a_missing_shard_is_named(pretrained: Path, tmp_path: Path) -> None:
    other = changed(pretrained, tmp_path / "other")
    (other / "model.safetensors").rename(other / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors of 2 files is not there"):
        run_tiny(tiny_plan(), tmp_path, init=str(other))


def test_what_the_model_has_no_use_for_is_said(pretrained: Path, tmp_path: Path) -> None:
    tensors = {**load_file(pretrained / "model.safetensors"), "value_head.weight": torch.zeros(3)}
    other = changed(pretrained, tmp_path / "other", tensors)
    _, printed = run_tiny(tiny_plan(), tmp_path, init=str(other), max_steps=1)
    assert f"note: of {other} the model has no use for value_head.weight" in printed


def test_the_new_head_of_a_classifier_is_allowed_and_said(pretrained: Path) -> None:
    config = {**CONFIG, "architectures": ["LlamaForSequenceClassification"], "num_labels": 3}
    task = {"config": config, "config_digest": config_digest(config), "task": "sequence-classification"}
    plan = tiny_plan(model=task)
    said: list[str] = []
    build_model(plan.model, plan.training, weights=str(pretrained), tell=said.append)
    assert any("does not hold score.weight: new, with random weights" in text for text in said)
    assert any("no use for lm_head.weight" in text for text in said)

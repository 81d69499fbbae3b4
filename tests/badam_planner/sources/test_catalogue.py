from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from datetime import date
from importlib.resources import files
from importlib.resources.abc import Traversable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from badam.errors import InputError
from badam_planner.sources import catalogue
from badam_planner.sources.catalogue import GpuRecord, ModelRecord, find_gpu, find_model, fold, fold_gpu, gpus, models

MODELS = {record.id: record for record in models()}
GPUS = {record.id: record for record in gpus()}

PROMISED_MODELS = [
    "meta-llama/Llama-2-7b-hf",
    "meta-llama/Llama-2-13b-hf",
    "meta-llama/Llama-2-70b-hf",
    "meta-llama/Meta-Llama-3-8B",
    "meta-llama/Meta-Llama-3-70B",
    "meta-llama/Llama-3.1-405B",
    "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-3.2-3B",
    "mistralai/Mistral-7B-v0.1",
    "mistralai/Mixtral-8x7B-v0.1",
    "Qwen/Qwen2.5-0.5B",
    "Qwen/Qwen2.5-7B",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen3-30B-A3B",
    "google/gemma-2-2b",
    "google/gemma-2-9b",
    "microsoft/Phi-3-mini-4k-instruct",
    "gpt2",
    "google-t5/t5-base",
    "t5-3b",
    "google/flan-t5-xl",
    "google/vit-base-patch16-224",
    "google/vit-large-patch16-224",
    "openai/whisper-small",
    "whisper-large-v3",
    "FacebookAI/roberta-large",
    "bert-base-uncased",
    "badam/demo-llama-12m",
]


@pytest.mark.parametrize("name", PROMISED_MODELS)
def test_every_promised_model_is_catalogued(name: str) -> None:
    assert name in find_model(name).names()


def test_at_least_thirty_cards_are_catalogued() -> None:
    assert len(GPUS) >= 30


@pytest.mark.parametrize(("records", "key"), [(models(), fold), (gpus(), fold_gpu)], ids=["models", "gpus"])
def test_every_name_names_one_record(records: tuple[ModelRecord | GpuRecord, ...], key: Callable[[str], str]) -> None:
    owners = Counter(name for record in records for name in {key(name) for name in record.names()})
    assert [name for name, count in owners.items() if count > 1] == []


def test_a_model_file_is_called_after_its_id() -> None:
    stems = {file.name.removesuffix(".json") for file in (files("badam_profiles") / "models").iterdir()}
    assert stems == {identifier.replace("/", "--") for identifier in MODELS}


@pytest.mark.parametrize("record", [*models(), *gpus()], ids=lambda record: record.id)
def test_every_record_has_a_source_and_a_real_day(record: ModelRecord | GpuRecord) -> None:
    own = isinstance(record, ModelRecord) and record.weights == "none"
    assert record.source.startswith("https://") or own
    assert date(2024, 1, 1) < date.fromisoformat(record.checked) <= date.today()


@pytest.mark.parametrize("record", gpus(), ids=lambda record: record.id)
def test_every_card_is_within_what_cards_are(record: GpuRecord) -> None:
    gib, label_gb = record.total_bytes / 2**30, record.nvml_total_mib / 1000
    assert 4 <= gib <= 300
    assert 0 < record.total_bytes - record.usable_bytes <= 2**30
    assert 2**27 <= record.context_bytes <= 2**29
    assert record.workspace_bytes == (32 * 2**20 if float(record.compute_capability) >= 9 else 8_519_680)
    assert 200e9 <= record.bandwidth_bytes_per_second <= 10e12
    assert 5e12 <= record.fp32_flops_per_second <= 150e12
    assert 1.9 <= record.fp16_flops_per_second / record.fp32_flops_per_second <= 35
    assert label_gb > 6


@pytest.mark.parametrize("record", gpus(), ids=lambda record: record.id)
def test_multiprocessors_and_rate_of_every_gpu_agree_on_a_clock_that_gpus_have(record: GpuRecord) -> None:
    cores = 64 if record.compute_capability in {"7.0", "7.5", "8.0"} else 128
    clock = record.fp32_flops_per_second / (2 * cores * record.multiprocessors)
    assert 1.3e9 <= clock <= 2.7e9
    assert record.threads_per_multiprocessor in {1024, 1536, 2048}


@pytest.mark.parametrize("record", gpus(), ids=lambda record: record.id)
def test_only_cards_with_bfloat16_tensor_cores_get_their_rate(record: GpuRecord) -> None:
    ampere_or_later = float(record.compute_capability) >= 8
    rate = record.fp16_flops_per_second if ampere_or_later else record.fp32_flops_per_second
    assert record.bf16_flops_per_second == rate


def test_every_field_of_a_card_is_explained_in_the_file() -> None:
    content = json.loads((files("badam_profiles") / "gpus.json").read_text())
    self_evident = {"id", "name", "aliases", "compute_capability", "checked", "nvml_total_measured"}
    assert set(content["fields"]) == set(GpuRecord.model_fields) - self_evident


@pytest.mark.parametrize("name", ["rtx3090", "RTX 3090", "NVIDIA GeForce RTX 3090", "geforce-rtx-3090", "Rtx_3090"])
def test_a_card_is_found_whatever_the_spelling(name: str) -> None:
    assert find_gpu(name) is GPUS["rtx3090"]


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-7b-hf", "llama-2-7b-hf", "LLAMA 2 7B", "llama2-7b"])
def test_a_model_is_found_whatever_the_spelling(name: str) -> None:
    assert find_model(name) == MODELS["meta-llama/Llama-2-7b-hf"]


@given(st.sampled_from([(record, name) for record in (*models(), *gpus()) for name in record.names()]), st.data())
def test_case_and_punctuation_never_matter(known: tuple[ModelRecord | GpuRecord, str], data: st.DataObject) -> None:
    record, name = known
    letters = [
        data.draw(st.sampled_from(["", "-", " ", "_", "."])) + data.draw(st.sampled_from([letter, letter.swapcase()]))
        for letter in name
        if letter.isalnum()
    ]
    find = find_model if isinstance(record, ModelRecord) else find_gpu
    assert find("".join(letters)) == record


def test_an_unknown_card_lists_near_ones() -> None:
    with pytest.raises(InputError, match=r"no GPU called 'rtx 3091'.*rtx3090") as caught:
        find_gpu("rtx 3091")
    assert caught.value.exit_code == 2


def test_a_name_that_could_be_two_sizes_of_a_card_is_not_guessed() -> None:
    with pytest.raises(InputError, match=r"(?s)(?=.*a100-40gb)(?=.*a100-80gb)"):
        find_gpu("a100")


def test_an_unknown_model_lists_near_ones() -> None:
    with pytest.raises(InputError, match=r"no model called 'Llama-2-7c-hf'.*Llama-2-7b-hf"):
        find_model("Llama-2-7c-hf")


def test_a_name_like_nothing_else_says_how_to_add_it() -> None:
    with pytest.raises(InputError, match=r"docs/catalogue\.md"):
        find_model("%%%")


def test_usable_memory_is_what_torch_sees_where_that_is_known() -> None:
    assert GPUS["rtx3090"].total_bytes == 24 * 2**30
    assert GPUS["rtx3090"].usable_bytes / 2**30 == pytest.approx(23.68, abs=0.01)


@pytest.mark.parametrize(("total_mib", "share_mib"), [(24576, 512), (40959, 512), (40960, 640), (81920, 640)])
def test_elsewhere_the_driver_keeps_an_allowance_that_grows_with_the_card(total_mib: int, share_mib: int) -> None:
    gpu = GPUS["a30"].model_copy(update={"nvml_total_mib": total_mib})
    assert gpu.total_bytes - gpu.usable_bytes == share_mib * 2**20


def test_a_record_becomes_a_target() -> None:
    record = GPUS["rtx3090"]
    target = record.target()
    assert (target.gpu, target.num_gpus, target.engine) == ("rtx3090", 1, "single")
    assert (target.total_bytes, target.usable_bytes) == (record.total_bytes, record.usable_bytes)
    assert (target.context_bytes, target.workspace_bytes) == (record.context_bytes, record.workspace_bytes)


def test_a_model_named_by_its_id_opens_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    read = catalogue._read_model

    def watched(file: Traversable) -> ModelRecord:
        opened.append(file.name)
        return read(file)

    monkeypatch.setattr(catalogue, "_read_model", watched)
    find_model("meta-llama/Llama-2-7b-hf")
    assert opened == ["meta-llama--Llama-2-7b-hf.json"]


def test_looking_up_a_card_and_a_model_loads_nothing_heavy() -> None:
    code = """if True:
        import sys
        from badam_planner.sources import catalogue, host, nvml
        catalogue.find_model("gpt2"), catalogue.find_gpu("rtx3090"), host.host_memory()
        print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "transformers", "numpy", "rich"}))
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.parametrize("identifier", list(MODELS))
def test_the_module_tree_has_the_published_number_of_parameters(identifier: str) -> None:
    from badam.plan import ModelSpec, Training
    from badam.training.build import build_model, choose_attention
    from badam_planner.rehearsal.rehearse import fake_world

    record = MODELS[identifier]
    spec = ModelSpec(
        id=record.id, source="catalogue", config=record.config, config_digest="", task=record.task, parameters=1
    )
    with fake_world():
        model = build_model(spec, Training(batch_size=1, seq_len=1, attention=choose_attention(spec)))
    assert sum(parameter.numel() for parameter in model.parameters()) == record.parameters
    assert [type(model).__name__] == record.config["architectures"]


SHAPELESS = {"rms_norm_eps", "max_position_embeddings", "router_aux_loss_coef", "rope_parameters", "sliding_window"}
"""Facts of single checkpoints that a class's defaults need not have, and that change no weight's shape."""


@pytest.mark.parametrize("record", [each for each in catalogue.models() if each.confirmed_by], ids=lambda each: each.id)
def test_facts_that_a_library_confirms_are_its_defaults(record: catalogue.ModelRecord) -> None:
    from transformers import AutoConfig

    default = AutoConfig.for_model(record.config["model_type"])
    assert str(record.confirmed_by).partition(" ")[0] == type(default).__name__
    known = default.to_dict()
    differing = {key for key, value in record.config.items() if key in known and known[key] != value}
    assert differing - {"architectures"} <= SHAPELESS

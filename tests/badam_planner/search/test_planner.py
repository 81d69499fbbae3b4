"""The search on cards that are only just large enough."""

from __future__ import annotations

from typing import Any

import pytest

from badam.plan import ModelSpec, Target
from badam_planner.search.model_spec import specify
from badam_planner.search.planner import Request, make_plan
from badam_planner.search.result import Answer
from badam_planner.sources.model_source import find_config
from badam_planner.sources.target import find_target


@pytest.fixture(scope="module")
def gpt2() -> ModelSpec:
    name, source, config = find_config("openai-community/gpt2")
    return specify(name, source, {**config, "n_layer": 3})


@pytest.fixture(scope="module")
def gpu() -> Target:
    return find_target("rtx3090")


def ask(spec: ModelSpec, target: Target, **options: Any) -> Answer:
    choices = {"partition": "layer", "batch_size": 2, "seq_len": 256, "checkpointing": "all", "loss": "full"}
    return make_plan(Request(spec=spec, target=target, **{**choices, **options}))


@pytest.fixture(scope="module")
def needed(gpt2: ModelSpec, gpu: Target) -> dict[str, int]:
    """Device bytes with and without expandable segments."""
    answers = {choice: ask(gpt2, gpu, expandable_segments=choice) for choice in ("off", "on")}
    return {choice: answer.result.candidates[0].peak_device_bytes for choice, answer in answers.items()}


def test_expandable_segments_are_used_only_where_the_usual_ones_do_not_fit(
    gpt2: ModelSpec, gpu: Target, needed: dict[str, int]
) -> None:
    assert needed["on"] < needed["off"]
    for usable, expected in ((needed["off"], False), (needed["off"] - 1, True), (needed["on"], True)):
        answer = ask(gpt2, gpu.model_copy(update={"usable_bytes": usable}))
        assert answer.plan is not None
        assert answer.plan.target.expandable_segments is expected
        assert answer.result.candidates[0].expandable_segments is expected
        assert answer.plan.prediction is not None
        assert answer.plan.prediction.peak_device_bytes == needed["on" if expected else "off"]


def test_a_refusal_offers_what_was_switched_off(gpt2: ModelSpec, gpu: Target) -> None:
    def device_bytes(seq_len: int, choice: str) -> int:
        found = ask(gpt2, gpu, checkpointing="all", loss="chunked", seq_len=seq_len, expandable_segments=choice)
        return found.result.candidates[0].peak_device_bytes

    lengths = (128, 256, 384, 512, 768)
    seq_len = next(each for each in lengths if device_bytes(each, "on") < device_bytes(each, "off"))
    leanest = {"checkpointing": "all", "loss": "chunked", "seq_len": seq_len}
    just_enough = gpu.model_copy(update={"usable_bytes": device_bytes(seq_len, "on")})
    refused = ask(gpt2, just_enough, **leanest, expandable_segments="off")
    assert refused.plan is None
    assert refused.refusal is not None
    assert "--checkpointing all --loss chunked --expandable-segments on" in (refused.refusal.advice or "")


def test_qlora_names_what_its_library_leaves_unquantized(gpu: Target) -> None:
    facts = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    falcon = specify("falcon", "config", {"model_type": "falcon", "architectures": ["FalconForCausalLM"], **facts})
    llama = specify("llama", "config", {"model_type": "llama", "intermediate_size": 128, **facts})
    (note,) = ask(falcon, gpu, method="qlora", partition="auto").notes
    assert note.startswith(
        "qlora leaves 168.00 KiB of the layers' weights in bfloat16"
    )  # 2 layers of 10.5 * 64² entries
    assert "mlp.dense_h_to_4h.weight" in note
    assert ask(llama, gpu, method="qlora", partition="auto").notes == ()
    assert ask(falcon, gpu, method="lora", partition="auto").notes == ()


def test_a_model_whose_weights_no_card_holds_is_to_be_sharded(gpt2: ModelSpec, gpu: Target) -> None:
    small = gpu.model_copy(update={"usable_bytes": gpu.context_bytes + 2**20})
    for method, options in (("badam", "with --engine fsdp2"), ("adam", "with --method badam --engine fsdp2")):
        refused = ask(gpt2, small, method=method, partition="auto").refusal
        assert refused is not None
        assert f"Shard it over several cards {options} --num-gpus auto" in (refused.advice or "")
    on_this_machine = ask(gpt2, small.model_copy(update={"gpu": "cpu"}), partition="auto").refusal
    assert on_this_machine is not None
    assert "Choose a larger card or a smaller model." in (on_this_machine.advice or "")


def test_what_runs_only_by_giving_back_cached_segments_is_planned_on_request(
    gpt2: ModelSpec, gpu: Target, needed: dict[str, int]
) -> None:
    just_short = gpu.model_copy(update={"usable_bytes": needed["off"] - 1})
    refused = ask(gpt2, just_short, expandable_segments="off")
    assert refused.plan is None
    assert refused.refusal is not None
    assert "gives back its cached segments" in refused.refusal.message
    assert "--allow-cache-release" in refused.refusal.message
    answer = ask(gpt2, just_short, expandable_segments="off", allow_cache_release=True)
    assert answer.refusal is None
    assert answer.plan is not None
    assert answer.plan.prediction is not None
    assert answer.plan.prediction.cache_releases_per_step is not None
    assert answer.plan.prediction.peak_device_bytes > just_short.usable_bytes
    assert any("does not fit" in note for note in answer.notes)


def test_a_plan_that_fits_gives_back_nothing_and_what_runs_out_even_so_is_refused(
    gpt2: ModelSpec, gpu: Target, needed: dict[str, int]
) -> None:
    fits = ask(gpt2, gpu, allow_cache_release=True)
    assert fits.plan is not None
    assert fits.plan.prediction is not None
    assert fits.plan.prediction.cache_releases_per_step is None
    far_short = gpu.model_copy(update={"usable_bytes": needed["on"] // 2})
    refused = ask(gpt2, far_short, allow_cache_release=True)
    assert refused.plan is None
    assert refused.refusal is not None
    assert "--allow-cache-release" not in refused.refusal.message

"""A whole run under a plan, from records on disk to a model that transformers can load."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from badam.errors import DataError, InputError, OutOfMemory
from badam.plan import load_plan, record_digest
from badam.profiling.record import load_measured
from badam.training import engines as engines_module
from badam.training import run_directory as checkpoints_module
from badam.training import trainer as trainer_module
from badam.training import weights as weights_module
from badam.training.data import batches as batches_module
from badam.training.methods import base as base_module
from badam.vocabulary import Category, Phase
from tests.badam.training.tiny import CONFIG, LAYERS, records, run_tiny, tiny_plan, write_jsonl


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(directory).state_dict())


def metrics(directory: Path, name: str) -> list[Any]:
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)[name] for line in lines]


def losses(directory: Path) -> list[float]:
    return metrics(directory, "loss")


def test_a_run_leaves_a_model_its_plan_and_what_was_measured(tmp_path: Path) -> None:
    plan = tiny_plan()
    result, _ = run_tiny(plan, tmp_path, max_steps=6)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert model.dtype is torch.bfloat16
    assert tokenizer.decode(tokenizer("say moon star")["input_ids"]) == "say moon star"
    assert list((tmp_path / "run/model").glob("*.safetensors"))
    assert load_plan(tmp_path / "run/plan.json") == plan
    assert load_measured(tmp_path / "run/measured.json") == result.measured
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")] == []


def test_the_measured_run_tells_memory_and_time_of_every_phase_and_block(tmp_path: Path) -> None:
    plan = tiny_plan(checkpointed=True)
    measured = run_tiny(plan, tmp_path, max_steps=6)[0].measured
    measurement = measured.measurement
    assert measured.plan_digest == record_digest(plan)
    assert [block.name for block in measurement.blocks] == [f"layer {index}" for index in range(LAYERS)]
    # Of equal blocks one shows its first step; the second, which finds its moments, is measured of each.
    assert [block.steps for block in measurement.blocks] == [2, *[1] * (LAYERS - 1)]
    assert set(measurement.by_phase) == set(Phase)
    assert set(measurement.seconds_by_phase) == set(Phase)
    assert max(measurement.by_phase.values()) == measurement.peak_allocated_bytes
    assert sum(measurement.by_category.values()) == measurement.peak_allocated_bytes
    assert measurement.tokens_per_second > 0
    assert measurement.steps == 6


def test_master_and_moments_at_the_peak_are_those_of_one_block(tmp_path: Path) -> None:
    """4 bytes of master and 8 of moments per parameter of the block, while the model takes 2 per parameter."""
    result, _ = run_tiny(tiny_plan(training={"batch_size": 8}), tmp_path, max_steps=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    in_block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    in_model = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    found = result.measured.measurement.by_category
    assert found[Category.MASTER] == 4 * in_block
    counters = 4 * len(list(model.model.layers[0].parameters()))
    assert found[Category.OPTIMIZER_STATE] == 8 * in_block + counters
    assert found[Category.PARAMETER] == 2 * in_model + buffers


def test_an_optimizer_step_of_several_micro_batches_is_measured_as_one(tmp_path: Path) -> None:
    result, _ = run_tiny(tiny_plan(training={"grad_accum": 3}), tmp_path, max_steps=4)
    measurement = result.measured.measurement
    assert measurement.steps == 4
    assert [block.name for block in measurement.blocks] == ["layer 0", "layer 1"]
    assert len(losses(tmp_path / "run")) == 4


def test_micro_batches_add_up_to_one_batch(tmp_path: Path) -> None:
    """They have different numbers of label tokens, so a mean of means would differ. Adam hides scale; the norm not."""
    for name, sizes in (("one", {"batch_size": 4}), ("two", {"batch_size": 2, "grad_accum": 2})):
        plan = tiny_plan(training={"dtype": "float32", **sizes})
        run_tiny(plan, tmp_path, output=name, max_steps=3)
    for figure in ("loss", "gradient_norm"):
        assert metrics(tmp_path / "two", figure) == pytest.approx(metrics(tmp_path / "one", figure), rel=1e-4)


def test_gradients_are_clipped_to_the_plans_norm_and_not_touched_without_one(tmp_path: Path) -> None:
    """With an epsilon of 1, the first update of Adam is proportional to the gradient."""
    for name, norm in (("clipped", 1e-6), ("free", 0.0)):
        run_tiny(
            tiny_plan(optimizer={"max_grad_norm": norm, "eps": 1.0}), tmp_path, output=name, max_steps=1, save_steps=1
        )
    clipped, free = weights(tmp_path / "clipped/checkpoint-1"), weights(tmp_path / "free/checkpoint-1")
    assert not all(torch.equal(clipped[name], free[name]) for name in free)
    assert metrics(tmp_path / "clipped", "gradient_norm")[0] > 0
    assert metrics(tmp_path / "free", "gradient_norm") == [None]


def test_the_learning_rate_rises_while_warming_up_and_falls_after(tmp_path: Path) -> None:
    run_tiny(tiny_plan(optimizer={"learning_rate": 0.01}), tmp_path, max_steps=6, warmup_steps=2)
    rates = metrics(tmp_path / "run", "learning_rate")
    assert rates[0] < rates[1] < rates[2] == 0.01
    assert rates[2] > rates[3] > rates[4] > rates[5]


@pytest.mark.parametrize(
    "rows",
    [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
        {"instruction": "greet", "output": "hello"},
        {"prompt": "hi ", "completion": "hello"},
    ],
    ids=["messages", "alpaca", "pair"],
)
def test_the_loss_is_taken_over_the_answer_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: dict[str, Any]
) -> None:
    seen = []
    original = batches_module.PlanCollator.__call__

    def noted(self: Any, examples: Any) -> Any:
        batch = original(self, examples)
        seen.append(batch["labels"][0])
        return batch

    monkeypatch.setattr(batches_module.PlanCollator, "__call__", noted)
    write_jsonl(tmp_path / "data.jsonl", [rows] * 4)
    run_tiny(tiny_plan(training={"seq_len": 48}), tmp_path, max_steps=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert tokenizer.decode(seen[0][seen[0] != -100]) == "hello" + tokenizer.eos_token


def test_the_second_pass_over_the_data_has_another_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orders = []
    original = trainer_module.EpochSampler.__iter__

    def noted(self: Any) -> Any:
        orders.append(list(original(self)))
        return iter(orders[-1])

    monkeypatch.setattr(trainer_module.EpochSampler, "__iter__", noted)
    run_tiny(tiny_plan(), tmp_path, max_steps=None, epochs=2)
    assert len(orders) == 2
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    for name, seed in (("first", 1), ("second", 1), ("third", 2)):
        run_tiny(tiny_plan(), tmp_path, output=name, max_steps=2, seed=seed)
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
    assert losses(tmp_path / "first") != losses(tmp_path / "third")


def test_only_visited_blocks_change(tmp_path: Path) -> None:
    run_tiny(tiny_plan(), tmp_path, max_steps=2, save_steps=1)
    before, after = weights(tmp_path / "run/checkpoint-1"), weights(tmp_path / "run/checkpoint-2")
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed
    assert all(name.startswith("model.layers.0.") for name in changed)


def test_the_last_block_is_left_as_every_block_is(tmp_path: Path) -> None:
    """Within a visit weights are rounded to nearest; a block that is left is rounded stochastically."""
    run_tiny(tiny_plan(), tmp_path, max_steps=3, save_steps=3)
    within, left = weights(tmp_path / "run/checkpoint-3"), weights(tmp_path / "run/model")
    changed = {name for name in within if not torch.equal(within[name], left[name])}
    assert changed
    assert all(name.startswith("model.layers.1.") for name in changed)
    for name in changed:
        torch.testing.assert_close(within[name], left[name], rtol=2**-7, atol=0)


def test_the_loss_falls(tmp_path: Path) -> None:
    run_tiny(tiny_plan(optimizer={"learning_rate": 0.02}), tmp_path, max_steps=30)
    found = losses(tmp_path / "run")
    assert sum(found[-5:]) / 5 < sum(found[:5]) / 5 - 0.2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_run_resumed_inside_a_visit_continues_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    plan = tiny_plan(training={"dtype": dtype, "grad_accum": 2}, schedule={"switch_every": 3, "switch_mode": "random"})
    run_tiny(plan, tmp_path, output="whole", max_steps=8)
    run_tiny(plan, tmp_path, output="parts", max_steps=8, save_steps=4)
    (tmp_path / "parts/metrics.jsonl").unlink()
    for later in ("checkpoint-8", "model"):
        (tmp_path / "parts" / later).rename(tmp_path / f"kept-{later}")
    run_tiny(plan, tmp_path, output="parts", max_steps=8, resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")[4:]
    first, second = weights(tmp_path / "whole/model"), weights(tmp_path / "parts/model")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    plan = tiny_plan()
    run_tiny(plan, tmp_path, max_steps=4, save_steps=1, keep=3)
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (2, 3, 4)}
    for step, name in ((4, "model.safetensors"), (3, "optimizer.pt")):
        path = tmp_path / f"run/checkpoint-{step}" / name
        path.write_bytes(path.read_bytes()[:-10])
    before = losses(tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").unlink()
    run_tiny(plan, tmp_path, max_steps=4, resume=True)
    assert losses(tmp_path / "run") == before[2:]


def test_resuming_a_complete_run_says_so(tmp_path: Path) -> None:
    run_tiny(tiny_plan(), tmp_path, max_steps=2, save_steps=2)
    with pytest.raises(InputError, match="2 of 2 steps"):
        run_tiny(tiny_plan(), tmp_path, max_steps=2, resume=True)


def test_resuming_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no complete checkpoint"):
        run_tiny(tiny_plan(), tmp_path, resume=True)


def test_a_full_disk_ends_the_run_and_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = trainer_module.Trainer._save_optimizer_and_scheduler

    def fill_disk(self: Any, output: str) -> None:
        if self.state.global_step > 1:
            Path(output, "optimizer.pt").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(self, output)

    monkeypatch.setattr(trainer_module.Trainer, "_save_optimizer_and_scheduler", fill_disk)
    with pytest.raises(InputError, match=r"checkpoint of step 2 .* No space left"):
        run_tiny(tiny_plan(), tmp_path, save_steps=1)
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert left == ["checkpoint-1", "metrics.jsonl", "plan.json"]
    assert weights(tmp_path / "run/checkpoint-1")


def test_a_refused_allocation_is_told_in_the_words_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward_loss = base_module.forward_loss

    def refuse(*args: Any, **kwargs: Any) -> torch.Tensor:
        forward_loss(*args, **kwargs)
        return torch.empty(2**50)

    monkeypatch.setattr(base_module, "forward_loss", refuse)
    with pytest.raises(OutOfMemory, match=r"in backward, when 4194304.00 GiB more") as caught:
        run_tiny(tiny_plan(), tmp_path)
    assert caught.value.exit_code == 3
    assert "--batch-size 1" in str(caught.value)


def test_blocks_that_would_never_train_are_named_before_the_run(tmp_path: Path) -> None:
    _, printed = run_tiny(tiny_plan(schedule={"switch_every": 4}), tmp_path, max_steps=3)
    assert "2 blocks will never train within 3 steps of K = 4: layer 1, layer 2" in printed
    assert "--switch-every 1" in printed


def test_lengths_are_told_with_the_share_that_is_cut(tmp_path: Path) -> None:
    rows = [{"prompt": "a ", "completion": "b " * 200}, *records(3)]
    write_jsonl(tmp_path / "data.jsonl", rows)
    _, printed = run_tiny(tiny_plan(), tmp_path, max_steps=1)
    assert "4 examples" in printed
    assert "1 (25.0%) are longer than the plan's 16" in printed


def test_longer_examples_are_refused_when_asked(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data.jsonl", [{"prompt": "a ", "completion": "b " * 200}])
    with pytest.raises(DataError, match="longer than the plan's 16 tokens"):
        run_tiny(tiny_plan(), tmp_path, on_long="refuse")


@pytest.mark.parametrize(
    "rows",
    [
        [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}],
        [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}],
        [{"instruction": "greet", "input": "", "output": "hello"}],
        [{"text": "a text without questions"}],
    ],
    ids=["messages", "sharegpt", "alpaca", "text"],
)
def test_every_format_trains(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    write_jsonl(tmp_path / "data.jsonl", rows * 4)
    result, _ = run_tiny(tiny_plan(training={"seq_len": 48}), tmp_path, max_steps=1)
    assert result.measured.measurement.steps == 1


def test_pretrained_weights_come_from_a_directory(tmp_path: Path) -> None:
    first, _ = run_tiny(tiny_plan(), tmp_path, output="first", max_steps=1, seed=3)
    start = weights(tmp_path / "first/model")
    run_tiny(tiny_plan(), tmp_path, output="second", max_steps=1, init=str(first.model_path))
    end = weights(tmp_path / "second/model")
    frozen = [name for name in start if not name.startswith("model.layers.0.")]
    assert all(torch.equal(start[name], end[name]) for name in frozen)


def test_weights_that_cannot_be_reached_are_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weights_module.socket, "create_connection", unreachable)
    monkeypatch.setattr(weights_module, "getproxies", dict)
    plan = tiny_plan(model={"id": "acme/never-published-7b"})
    with pytest.raises(InputError, match="cannot be reached") as caught:
        run_tiny(plan, tmp_path)
    assert "--init random" in str(caught.value)
    assert "local directory" in str(caught.value)


def test_a_disk_without_room_for_the_model_is_told_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"has 1000 B free; the run writes .* KiB"):
        run_tiny(tiny_plan(), tmp_path)
    assert not (tmp_path / "run").exists()


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    first, _ = run_tiny(tiny_plan(), tmp_path, output="first", max_steps=1)
    wider = tiny_plan(model={"config": {**CONFIG, "intermediate_size": 64}})
    with pytest.raises(InputError, match="cannot be loaded into the plan's model"):
        run_tiny(wider, tmp_path, output="second", init=str(first.model_path))


def test_what_a_model_cannot_do_is_not_blamed_on_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any, **__: Any) -> None:
        raise InputError("The model has no sdpa attention.")

    first, _ = run_tiny(tiny_plan(), tmp_path, output="first", max_steps=1)
    monkeypatch.setattr(engines_module.Engine, "build", build)
    with pytest.raises(InputError, match=r"^The model has no sdpa attention\.$"):
        run_tiny(tiny_plan(), tmp_path, output="second", init=str(first.model_path))


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_a_plan_for_several_gpus_is_refused_by_a_process_alone(tmp_path: Path, engine: str) -> None:
    plan = tiny_plan()
    shared = plan.model_copy(update={"target": plan.target.model_copy(update={"engine": engine, "num_gpus": 2})})
    with pytest.raises(InputError, match="one process was started"):
        run_tiny(shared, tmp_path)
    assert not (tmp_path / "run").exists()


def test_an_output_directory_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").touch()
    with pytest.raises(InputError, match=r"not empty .*thesis.tex"):
        run_tiny(tiny_plan(), tmp_path)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]

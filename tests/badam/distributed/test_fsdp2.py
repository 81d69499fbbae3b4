from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from badam import BlockOptimizer
from badam.distributed import shard_blocks
from badam.errors import InputError
from tests.badam.distributed import jobs
from tests.badam.distributed.workers import on_ranks

CASES: dict[str, dict[str, Any]] = {"plain": {}, "clipped": {"clip": 0.3}, "checkpointed": {"checkpointed": True}}
Run = tuple[list[float], dict[str, torch.Tensor]]
Pair = Callable[[str], list[Any]]


@pytest.fixture(scope="module")
def references() -> dict[str, Run]:
    return {name: jobs.run(how="single", **settings) for name, settings in CASES.items()}


@pytest.fixture(scope="module")
def pair() -> Pair:
    """What each of two processes returned for a request, all of which they did in one go."""
    requests: dict[str, tuple[str, dict[str, Any]]] = {
        "fsdp": ("several", {"cases": cases("fsdp")}),
        "copies": ("several", {"cases": cases("copies")}),
        "behind ddp": ("behind_ddp", {}),
        "collectives": ("collectives", {"compute": "bfloat16"}),
        "states": ("states", {}),
        "disagreement": ("every_disagreement", {}),
        "infinite fsdp": ("non_finite_on_one_rank", {"how": "fsdp"}),
        "infinite copies": ("non_finite_on_one_rank", {"how": "copies"}),
        "rounded": ("rounded", {"how": "hsdp"}),
        "rounded again": ("rounded", {"how": "hsdp"}),
        "rounded shards": ("rounded", {"how": "fsdp"}),
        "unused": ("with_unused_parameters", {}),
        "refusals": ("every_refusal", {}),
        "alone": ("one_switches_alone", {}),
    }
    on_each = on_ranks(2, jobs.all_of, requests=requests)

    def results(name: str) -> list[Any]:
        for each in on_each:
            if isinstance(each[name], AssertionError):
                raise each[name]
        return [each[name] for each in on_each]

    return results


def assert_equal_runs(run: Run, reference: Run) -> None:
    """Losses to 1e-5 relative, weights to 1e-5, over 3 block epochs of visits of 3 steps of 2 batches."""
    assert len(reference[0]) == 3 * jobs.LAYERS * 3
    torch.testing.assert_close(run[0], reference[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(run[1], reference[1], rtol=0, atol=1e-5)


def cases(how: str) -> dict[str, dict[str, Any]]:
    return {name: {"how": how, **settings} for name, settings in CASES.items()}


@pytest.mark.parametrize("how", ["fsdp", "copies"])
def test_two_processes_train_like_one(how: str, pair: Pair, references: dict[str, Run]) -> None:
    for results in pair(how):
        for name, run in results.items():
            assert_equal_runs(run, references[name])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp", "hsdp", "copies"])
def test_four_processes_train_like_one(how: str, references: dict[str, Run]) -> None:
    for results in on_ranks(4, jobs.several, cases=cases(how)):
        for name, run in results.items():
            assert_equal_runs(run, references[name])


def test_copies_behind_ddp_do_not_drift_apart(pair: Pair, references: dict[str, Run]) -> None:
    for run in pair("behind ddp"):
        assert_equal_runs(run, references["plain"])


def test_a_step_gathers_no_layer_below_the_active_block_twice_and_reduces_one(pair: Pair) -> None:
    units = 2 + jobs.LAYERS
    for name, counts in pair("collectives")[0]:
        above = jobs.LAYERS - int(name.rsplit(".", 1)[-1])
        assert counts == {"_allgather_base_": units + above, "_reduce_scatter_base_": 1}


def test_only_the_active_block_has_fp32_masters_and_moments_and_each_process_its_part(pair: Pair) -> None:
    held = pair("states")
    assert held[0]["active"] == sorted(held[0]["trained"])
    layer = sum(parameter.numel() for parameter in jobs.Layer().parameters())
    assert sum(each["entries"] for each in held) == layer
    for each in held:
        assert each["types"] == {"torch.bfloat16"}
        assert {kind for kind, _ in each["masters"] + each["moments"]} == {"torch.float32"}
        assert sum(size for _, size in each["masters"]) == each["entries"]
        assert sum(size for _, size in each["moments"]) == 2 * each["entries"]


def test_ranks_that_disagree_are_told_at_once_on_every_rank(pair: Pair) -> None:
    expected = {
        "seed": "do not agree on the schedule",
        "K": "switch_every=4, num_blocks=3, seed=5, start_block=None) on rank 1",
        "partition": "do not agree on the blocks",
        "order": "mode='ascending'",
        "learning rate": "do not agree on the base optimizer",
        "steps": "not at the same step: the first is at 1, the last at 0",
    }
    for messages in pair("disagreement"):
        assert {what for what, text in messages.items() if expected[what] not in text} == set(), messages


def test_a_rank_that_switches_alone_gets_a_message_and_does_not_hang(pair: Pair) -> None:
    waited, message = pair("alone")
    assert waited == "waited"
    assert "not all of the 2 ranks came there within 1 s" in message


@pytest.mark.parametrize("how", ["fsdp", "copies"])
def test_a_gradient_that_is_infinite_on_one_rank_skips_the_step_on_all(how: str, pair: Pair) -> None:
    assert pair(f"infinite {how}") == [(1, 1, True)] * 2


def test_replicas_round_alike_and_runs_repeat(pair: Pair) -> None:
    one, other = pair("rounded")
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    torch.testing.assert_close(one, pair("rounded again")[0], rtol=0, atol=0)
    halves = pair("rounded shards")
    assert {name: sum(half[name].numel() for half in halves) for name in one} == {n: w.numel() for n, w in one.items()}


def test_a_parameter_that_one_rank_does_not_use_is_averaged_with_zeros(pair: Pair) -> None:
    one, other = pair("unused")
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert not one["layers.1.up.weight"].equal(jobs.make_net().layers[1].up.weight.detach())


def test_what_sharded_parameters_cannot_have_is_refused_in_a_sentence(pair: Pair) -> None:
    messages = pair("refusals")[0]
    assert "not sharded" in messages["plain model"]
    assert "spread over several processes" in messages["ratio"]
    assert "rows are spread over several processes" in messages["rows"]
    assert "gradient_release" in messages["release"]
    assert "averages their gradients already" in messages["average"]


def test_without_a_process_group_sharding_and_averaging_say_what_is_missing() -> None:
    with pytest.raises(InputError, match="init_process_group"):
        shard_blocks(jobs.make_net())
    model = jobs.make_net()
    with pytest.raises(InputError, match="init_process_group"):
        BlockOptimizer(
            jobs.adamw(model.parameters()), list(model.named_parameters()), average_gradients=True, verbose=0
        )

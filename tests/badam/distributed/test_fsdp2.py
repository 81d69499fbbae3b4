from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from badam import BlockOptimizer
from badam.distributed import shard_blocks
from badam.errors import InputError
from tests.badam.distributed import fsdp2_jobs as jobs
from tests.badam.distributed import small_training
from tests.badam.distributed.small_training import LAYERS, Run, assert_equal_runs, make_net
from tests.badam.distributed.workers import Requests, on_ranks, one_after_another

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip": 0.3},
    "checkpointed": {"checkpointed": True},
    "averaged once": {"clip": 0.3, "once": True},
}
Pair = Callable[[str], list[Any]]


@pytest.fixture(scope="module")
def references() -> dict[str, Run]:
    return {name: small_training.run(how="single", **settings) for name, settings in CASES.items()}


@pytest.fixture(scope="module")
def pair() -> Pair:
    """What each of two processes returned for a request, all of which they did in one go."""
    requests: Requests = {
        "fsdp": (jobs.several, {"cases": cases("fsdp")}),
        "copies": (jobs.several, {"cases": cases("copies")}),
        "behind ddp": (jobs.behind_ddp, {}),
        "collectives": (jobs.collectives, {"compute": "bfloat16"}),
        "states": (jobs.states, {}),
        "disagreement": (jobs.every_disagreement, {}),
        "infinite fsdp": (jobs.non_finite_on_one_rank, {"how": "fsdp"}),
        "infinite copies": (jobs.non_finite_on_one_rank, {"how": "copies"}),
        "rounded": (jobs.rounded, {"how": "hsdp"}),
        "rounded again": (jobs.rounded, {"how": "hsdp"}),
        "rounded shards": (jobs.rounded, {"how": "fsdp"}),
        "unused": (jobs.with_unused_parameters, {}),
        "refusals": (jobs.every_refusal, {}),
        "groups": (jobs.groups_of, {"size": 3}),
        "alone": (jobs.one_switches_alone, {}),
    }
    on_each = on_ranks(2, one_after_another, requests=requests)

    def results(name: str) -> list[Any]:
        for each in on_each:
            if isinstance(each[name], AssertionError):
                raise each[name]
        return [each[name] for each in on_each]

    return results


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
    units = 2 + LAYERS
    for name, counts in pair("collectives")[0]:
        above = LAYERS - int(name.rsplit(".", 1)[-1])
        assert counts == {"_allgather_base_": units + above, "_reduce_scatter_base_": 1}


def test_only_the_active_block_has_fp32_masters_and_moments_and_each_process_its_part(pair: Pair) -> None:
    held = pair("states")
    assert held[0]["active"] == sorted(held[0]["trained"])
    layer = sum(parameter.numel() for parameter in small_training.Layer().parameters())
    assert sum(each["entries"] for each in held) == layer
    for each in held:
        assert each["types"] == {"torch.bfloat16"}
        assert {kind for kind, _ in each["masters"] + each["moments"]} == {"torch.float32"}
        assert sum(size for _, size in each["masters"]) == each["entries"]
        assert sum(size for _, size in each["moments"]) == 2 * each["entries"]


def test_processes_that_cannot_be_dealt_out_in_groups_are_told(pair: Pair) -> None:
    assert pair("groups") == ["2 processes cannot be divided into groups of 3."] * 2


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
    assert "not all of the 2 ranks reached within 1 s" in message


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
    assert not one["layers.1.up.weight"].equal(make_net().layers[1].up.weight.detach())


def test_what_sharded_parameters_cannot_have_is_refused_in_a_sentence(pair: Pair) -> None:
    messages = pair("refusals")[0]
    assert "not sharded" in messages["plain model"]
    assert "spread over several processes" in messages["ratio"]
    assert "rows are spread over several processes" in messages["rows"]
    assert "gradient_release" in messages["release"]
    assert "averages their gradients already" in messages["average"]


def test_without_a_process_group_sharding_and_averaging_say_what_is_missing() -> None:
    with pytest.raises(InputError, match="init_process_group"):
        shard_blocks(make_net())
    model = make_net()
    with pytest.raises(InputError, match="init_process_group"):
        BlockOptimizer(
            small_training.adamw(model.parameters()), list(model.named_parameters()), average_gradients=True, verbose=0
        )

"""What each engine makes of one GPU's step, and that nobody else asks which engine it is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from badam.vocabulary import Category, Engine, Offload, Phase
from badam_planner.multi_gpu.engines import ENGINES
from badam_planner.recording.recording import Recording
from tests.badam_planner.multi_gpu.models import MATRIX, PARAMETERS, one_gpu_step, sharding
from tests.badam_planner.multi_gpu.targets import gpus_of
from tests.badam_planner.rehearsal.plans import LLAMA, plan_of

ROOT = Path(__file__).parent.parent.parent.parent
JOINING = [name for name, engine in ENGINES.items() if engine.joins_gpus]


def rank_of(name: Engine, shards: int = 2, **changes: Offload) -> Recording:
    plan, _ = plan_of(LLAMA, 2, target=gpus_of(name, shards).model_copy(update=changes))
    return ENGINES[name].per_rank(one_gpu_step(), plan, sharding(shards))


def test_every_engine_of_a_plan_has_a_model() -> None:
    assert set(ENGINES) == set(get_args(Engine))


def test_one_gpu_alone_is_left_as_it_is_and_sends_nothing() -> None:
    alone = one_gpu_step()
    plan, _ = plan_of(LLAMA, 2)
    assert ENGINES["single"].per_rank(alone, plan, sharding(1)) is alone
    assert ENGINES["single"].traffic(alone, plan, sharding(1)) is None


@pytest.mark.parametrize("name", JOINING)
def test_what_an_engine_adds_bears_its_name(name: Engine) -> None:
    known = {one.operation for one in one_gpu_step().allocations}
    assert {one.operation for one in rank_of(name).allocations} - known == {name}


@pytest.mark.parametrize("name", JOINING)
def test_parameters_lie_in_parts_exactly_where_the_engine_cuts_the_model(name: Engine) -> None:
    whole = sum(2 * info.numel for info in PARAMETERS)
    held = sum(one.nbytes for one in rank_of(name).allocations if one.category is Category.PARAMETER)
    assert (held < whole) is ENGINES[name].cuts_model


@pytest.mark.parametrize("name", JOINING)
def test_every_engine_sends_the_gradients_of_the_active_block_and_less_than_full_training(name: Engine) -> None:
    plan, _ = plan_of(LLAMA, 2, target=gpus_of(name, 2))
    pair = ENGINES[name].traffic(one_gpu_step(), plan, sharding(2))
    assert pair is not None
    own, full = (traffic.reduced_bytes + traffic.averaged_bytes for traffic in pair)
    assert own in (2 * MATRIX, 4 * MATRIX)
    assert own < full


@pytest.mark.parametrize("name", list(ENGINES))
def test_host_memory_is_taken_by_engines_that_offload_alone(name: Engine) -> None:
    assert ENGINES[name].host_bytes(sharding(2), "none") is None
    held = ENGINES[name].host_bytes(sharding(2), "optimizer")
    assert held == (20 * MATRIX // 2 if ENGINES[name].offloads else None)


def test_zero3_keeps_no_states_on_the_gpu_that_are_offloaded() -> None:
    states = (Category.MASTER, Category.OPTIMIZER_STATE)
    plan, _ = plan_of(LLAMA, 2, target=gpus_of("zero3", 2).model_copy(update={"gpu": "card", "offload": "all"}))
    recording = ENGINES["zero3"].per_rank(one_gpu_step(), plan, sharding(2))
    assert [one for one in recording.allocations if one.category in states] == []
    here = [one for one in rank_of("zero3").allocations if one.category in states]
    assert sum(one.nbytes for one in here) == 2 * 4 * MATRIX // 2


def test_ranks_have_the_phases_of_one_gpu() -> None:
    phases = [phase for _, phase in one_gpu_step().phase_starts]
    for name in JOINING:
        recording = rank_of(name)
        assert [phase for _, phase in recording.phase_starts] == phases
        assert recording.phase_starts[0][1] is Phase.SETUP


# -- nobody else asks


def compared_with_engines(source: str) -> Iterator[int]:
    """Lines on which something is compared with, looked up by, or matched against the name of an engine."""
    names = set(get_args(Engine))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            parts = [
                part
                for side in sides
                for part in (side.elts if isinstance(side, ast.Tuple | ast.Set | ast.List) else [side])
            ]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        else:
            continue
        if any(isinstance(part, ast.Constant) and part.value in names for part in parts):
            yield node.lineno


def test_the_search_for_comparisons_finds_every_kind() -> None:
    for source in ("a == 'ddp'", "'fsdp2' != a", "a in ('single', b)", "match a:\n case 'zero3': pass"):
        assert list(compared_with_engines(source))
    assert list(compared_with_engines("a = 'ddp'; b(engine='single'); a == 'full'")) == []


def test_no_source_of_planner_and_commands_compares_the_name_of_an_engine() -> None:
    home = ROOT / "badam_planner/multi_gpu/engines.py"
    files = [path for top in ("badam_planner", "cli") for path in (ROOT / top).rglob("*.py") if path != home]
    assert len(files) > 80
    found = {str(path.relative_to(ROOT)): list(compared_with_engines(path.read_text())) for path in files}
    assert {name: lines for name, lines in found.items() if lines} == {}

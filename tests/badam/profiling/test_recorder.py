"""Recording a loop of your own, whether it announces its phases or not."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import badam.profiling
from badam import BlockOptimizer, BlockOptimizerRatio, phases
from badam.errors import BadamError
from badam.plan import Plan
from badam.profiling.record import load_measured
from badam.profiling.recorder import Recorder
from badam.training.build import build_model, build_optimizer
from badam.training.losses import forward_loss
from badam.vocabulary import STEP_PHASES, Category, Phase
from tests.badam.training.tiny import LAYERS, tiny_plan


def batch(plan: Plan) -> dict[str, torch.Tensor]:
    shape = (plan.training.batch_size, plan.training.seq_len)
    tokens = torch.randint(3, 300, shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "labels": tokens.clone()}


def assembled(plan: Plan) -> tuple[nn.Module, BlockOptimizer]:
    torch.manual_seed(0)
    model = build_model(plan.model, plan.training, weights=None)
    return model, build_optimizer(model, plan)


def silent_step(model: nn.Module, plan: Plan) -> torch.Tensor:
    loss: torch.Tensor = model(**batch(plan)).loss
    return loss


def announced_step(model: nn.Module, plan: Plan) -> torch.Tensor:
    return forward_loss(model, batch(plan), "full")


@pytest.mark.parametrize("forward", [silent_step, announced_step])
def test_a_loop_of_ones_own_is_recorded_by_block_and_phase(
    tmp_path: Path, forward: Callable[[nn.Module, Plan], torch.Tensor]
) -> None:
    plan = tiny_plan()
    model, optimizer = assembled(plan)
    with badam.profiling.record(optimizer, model, plan=plan) as run:
        for _ in range(2 * LAYERS):
            loss = forward(model, plan)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.note(loss=loss.item(), tokens=32)
            del loss
    assert [step.block for step in run.steps] == [0, 0, 1, 1, 2, 2]
    assert all(set(step.memory.peak_by_phase) >= {Phase.FORWARD, Phase.BACKWARD, Phase.STEP} for step in run.steps)
    assert [Phase.SWITCH in step.memory.peak_by_phase for step in run.steps] == [False, True] * LAYERS
    run.save(tmp_path / "measured.json")
    measurement = load_measured(tmp_path / "measured.json").measurement
    assert measurement.steps == 2 * LAYERS
    assert measurement.step_seconds > 0
    assert phases.current() is Phase.SETUP


def test_both_ways_of_looping_measure_the_same_peak() -> None:
    peaks = []
    for forward in (silent_step, announced_step):
        plan = tiny_plan()
        model, optimizer = assembled(plan)
        with badam.profiling.record(optimizer, model, plan=plan) as run:
            base = run.live_bytes
            for _ in range(2):
                loss = forward(model, plan)
                loss.backward()
                optimizer.step()
                del loss
        peaks.append(max(step.memory.peak_bytes for step in run.steps) - base)
        del model, optimizer, run
        gc.collect()  # the first model must not die while the second is measured
    assert peaks[0] == peaks[1]


def test_masters_exist_from_the_first_step_of_a_visit_and_are_released_by_the_switch() -> None:
    plan = tiny_plan(training={"batch_size": 8})
    model, optimizer = assembled(plan)
    with badam.profiling.record(optimizer, model) as run:
        for _ in range(3):
            forward_loss(model, batch(plan), "full").backward()
            optimizer.step()
    in_block = 4 * sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    masters = [step.memory.by_category.get(Category.MASTER, 0) for step in run.steps]
    assert masters == [0, in_block, 0]


def test_a_plain_optimizer_is_recorded_as_one_block() -> None:
    model = nn.Linear(32, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with badam.profiling.record(optimizer, model) as run:
        for _ in range(2):
            model(torch.ones(4, 32)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [step.block for step in run.steps] == [0, 0]
    assert set(run.steps[1].seconds) == {Phase.SETUP, Phase.FORWARD, Phase.BACKWARD, Phase.STEP}


def test_updates_inside_backward_end_no_step() -> None:
    plan = tiny_plan()
    model = build_model(plan.model, plan.training, weights=None)
    optimizer = BlockOptimizerRatio(
        [{"params": list(model.parameters())}], list(model.named_parameters()), update_ratio=0.5, gradient_release=True
    )
    with badam.profiling.record(optimizer, model) as run:
        for _ in range(2):
            forward_loss(model, batch(plan), "full").backward()
            optimizer.step()
    assert len(run.steps) == 2


def test_where_steps_are_picked_the_first_that_finds_its_moments_is_measured() -> None:
    model = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    recorder = Recorder(torch.device("cpu"), every_step=False)
    recorder.start()
    recorder.attach(model, optimizer)
    for _ in range(4):
        inputs = torch.ones(4, 64)
        recorder.next_step([{"inputs": inputs}])
        phases.enter(Phase.FORWARD)
        loss = model(inputs).sum()
        phases.enter(Phase.BACKWARD)
        loss.backward()
        phases.enter(Phase.STEP)
        optimizer.step()
        optimizer.zero_grad()
        phases.enter(Phase.SETUP)
    recorder.stop()
    memories = [step.memory for step in recorder.log.steps]
    assert [memory is not None for memory in memories] == [True, True, False, False]
    assert memories[1] is not None
    assert memories[1].by_category[Category.OPTIMIZER_STATE] == 2 * 4 * (64 * 64 + 64) + 2 * 4


def test_a_run_without_a_loss_leaves_no_record(tmp_path: Path) -> None:
    plan = tiny_plan()
    model, optimizer = assembled(plan)
    with badam.profiling.record(optimizer, model, plan=plan) as run:
        forward_loss(model, batch(plan), "full").backward()
        optimizer.step()
    with pytest.raises(BadamError, match="1 optimizer steps and 0 losses"):
        run.save(tmp_path / "measured.json")
    assert not (tmp_path / "measured.json").exists()


def test_hooks_and_listeners_are_gone_afterwards() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with badam.profiling.record(optimizer, model) as run:
        pass
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert run.steps == []
    assert phases.current() is Phase.SETUP


def test_a_recorder_may_be_stopped_twice() -> None:
    recorder = Recorder(torch.device("cpu"), every_step=True)
    recorder.start()
    recorder.stop()
    recorder.stop()


def test_seconds_of_a_step_sum_to_no_more_than_the_wall_clock() -> None:
    import time

    plan = tiny_plan()
    model, optimizer = assembled(plan)
    begun = time.perf_counter()
    with badam.profiling.record(optimizer, model, plan=plan) as run:
        for _ in range(3):
            forward_loss(model, batch(plan), "full").backward()
            optimizer.step()
    elapsed = time.perf_counter() - begun
    assert 0 < sum(step.seconds.get(phase, 0.0) for step in run.steps for phase in STEP_PHASES) <= elapsed

"""DeepSpeed ZeRO-3 on CPU processes; skipped where DeepSpeed is not installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.badam.distributed import small_training
from tests.badam.distributed import zero3_jobs as jobs
from tests.badam.distributed.small_training import LAYERS, SWITCH_EVERY, assert_equal_runs
from tests.badam.distributed.workers import on_ranks, results_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.mark.slow
def test_two_processes_train_like_one_and_lose_no_update_and_resume(tmp_path: Path) -> None:
    directory, narrow = str(tmp_path / "fp32"), str(tmp_path / "bf16")
    results = results_of(
        2,
        {
            "run": (jobs.run_deepspeed, {}),
            "optimizer offloaded": (jobs.run_deepspeed, {"offload": ("optimizer",)}),
            "all offloaded": (jobs.run_deepspeed, {"offload": ("optimizer", "param")}),
            "last updates": (jobs.last_updates, {}),
            "saved": (jobs.save_deepspeed, {"directory": directory}),
            "resumed": (jobs.resume_deepspeed, {"directory": directory}),
            "saved bf16": (jobs.save_deepspeed, {"directory": narrow, "dtype": "bfloat16"}),
            "resumed bf16": (jobs.resume_deepspeed, {"directory": narrow, "dtype": "bfloat16"}),
            "saved whole": (jobs.save_portable, {"directory": directory}),
            "resumed whole": (jobs.resume_portable, {"directory": directory}),
            "refusals": (jobs.deepspeed_refusals, {"directory": directory}),
            "other number": (jobs.other_number_of_processes, {"directory": directory}),
        },
    )
    reference = small_training.run(how="single")
    for each in results:
        for run in ("run", "optimizer offloaded", "all offloaded"):
            assert_equal_runs(each[run], reference)
        assert each["last updates"] == [(True, False)] * LAYERS
        torch.testing.assert_close(each["resumed"], each["saved"], rtol=0, atol=0)
        torch.testing.assert_close(each["resumed bf16"], each["saved bf16"], rtol=0, atol=0)
        torch.testing.assert_close(each["resumed whole"], each["saved whole"], rtol=0, atol=0)
        assert "ds_optimizer = engine.optimizer" in each["refusals"]["not attached"]
        assert "DeepSpeed 0.20.1 is not known" in each["refusals"]["unknown version"]
        assert "ZeRO stage 3" in each["refusals"]["not stage 3"]
        assert "no complete checkpoint" in each["refusals"]["missing"]
        assert "written by 4 processes, and these are 2" in each["other number"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_portable_checkpoint_of_four_processes_goes_on_in_two(tmp_path: Path, dtype: str) -> None:
    settings = {"directory": str(tmp_path), "dtype": dtype}
    losses, weights = on_ranks(4, jobs.save_portable, **settings)[0]
    for resumed in on_ranks(2, jobs.resume_portable, **settings):
        # In bf16 the gradients of other parts of a batch round differently.
        torch.testing.assert_close(resumed[0], losses, rtol=1e-5 if dtype == "float32" else 2e-2, atol=0)
        if dtype == "float32":
            torch.testing.assert_close(resumed[1], weights, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_four_processes_train_like_one() -> None:
    reference = small_training.run(how="single")
    for run in on_ranks(4, jobs.run_deepspeed):
        assert_equal_runs(run, reference)


@pytest.mark.slow
def test_a_trainer_under_zero3_switches_blocks_through_the_callback(tmp_path: Path) -> None:
    for steps, visits, driven, losses in on_ranks(2, jobs.zero3_in_a_trainer, directory=str(tmp_path)):
        assert (steps, visits, driven) == (LAYERS * SWITCH_EVERY, LAYERS, True)
        assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_process_never_holds_the_whole_model_that_it_reads_or_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")  # what is let go of leaves the process, and can be seen
    directory = str(tmp_path / "model")
    for grew, model_bytes in on_ranks(2, jobs.peak_of_building, directory=directory, how="whole"):
        assert grew > model_bytes
    for grew, model_bytes in on_ranks(2, jobs.peak_of_building, directory=directory, how="resumed"):
        assert grew < 0.75 * model_bytes
    # The first process maps the files, and their pages count where they are resident.
    (grew_first, model_bytes), (grew, _) = on_ranks(2, jobs.peak_of_building, directory=directory, how="read")
    assert grew < 0.75 * model_bytes
    assert grew_first < 1.75 * model_bytes

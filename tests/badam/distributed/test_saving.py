from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.badam.distributed import saving_jobs as jobs
from tests.badam.distributed.small_training import assert_equal_runs
from tests.badam.distributed.workers import ROOT, on_ranks, results_of

SECONDS_TO_END = 60


@pytest.mark.slow
def test_a_run_saved_on_four_processes_goes_on_on_two_with_the_same_losses(tmp_path: Path) -> None:
    path = str(tmp_path / "saved")
    expected = on_ranks(4, jobs.save, path=path)[0]
    for run in on_ranks(2, jobs.resume, path=path):
        assert_equal_runs(run, expected)


def test_a_run_goes_on_bit_identically_and_wrong_checkpoints_are_refused(tmp_path: Path) -> None:
    sharded, copies, model = (str(tmp_path / name) for name in ("sharded", "copies", "model"))
    results = results_of(
        2,
        {
            "saved": (jobs.save, {"path": sharded, "dtype": "bfloat16"}),
            "resumed": (jobs.resume, {"path": sharded, "dtype": "bfloat16"}),
            "saved copies": (jobs.save, {"path": copies, "how": "copies"}),
            "resumed copies": (jobs.resume, {"path": copies, "how": "copies"}),
            "refusals": (jobs.checkpoint_refusals, {"path": copies}),
            "model": (jobs.whole_model, {"path": model}),
        },
    )
    for each in results:
        torch.testing.assert_close(each["resumed"], each["saved"], rtol=0, atol=0)
        torch.testing.assert_close(each["resumed copies"], each["saved copies"], rtol=0, atol=0)
        refusals = each["refusals"]
        assert "something at" in refusals["there"]
        assert "no complete checkpoint" in refusals["missing"]
        assert "no complete checkpoint" in refusals["partial"]
        assert "another partition: 3 blocks there, 2 here" in refusals["partition"]
        assert "save_pretrained" in refusals["not transformers"]
    from transformers import LlamaForCausalLM

    loaded = LlamaForCausalLM.from_pretrained(model)
    torch.testing.assert_close(dict(loaded.named_parameters()), results[0]["model"], rtol=0, atol=0, check_dtype=False)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_killing_a_rank_ends_the_others_and_leaves_the_checkpoint_before_it_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.Popen(
        [*command, "-m", "tests.badam.distributed.endless", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 90
        while len(list(tmp_path.glob("step-*"))) < 2:
            assert run.poll() is None, run.communicate()[1]
            assert time.monotonic() < deadline, "no checkpoint"
            time.sleep(0.2)
        os.kill(int((tmp_path / "rank-1.pid").read_text()), signal.SIGKILL)
        message = run.communicate(timeout=SECONDS_TO_END)[1]
    finally:
        run.kill()
    assert run.returncode != 0
    assert "Signal 9 (SIGKILL)" in message
    saved = sorted(tmp_path.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    for path in saved[-2:]:
        steps = on_ranks(2, jobs.steps_in, path=str(path))
        assert steps == [int(path.name.removeprefix("step-"))] * 2

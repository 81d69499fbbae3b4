"""Hosts that start several processes by themselves: the same training as in one, or one sentence why not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from transformers.distributed import DistributedConfig

from tests.badam.distributed import hosts
from tests.badam.distributed.hosts import Course
from tests.badam.distributed.workers import on_ranks

UNITS = hosts.LAYERS + 2  # the embedding, the layers, and the last norm with the head
GATHERS = [hosts.ACCUMULATE * (UNITS + layers) for _ in range(2) for layers in (3, 2, 1) for _ in range(hosts.EVERY)]
"""In each step: all in forward, and in backward the layers down to the active block."""
ZERO3 = importlib.util.find_spec("deepspeed") is not None


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hosts")
    hosts.save_model(path / "model")
    return path


@pytest.fixture(scope="module")
def alone(directory: Path) -> Course:
    (course,) = hosts.courses(str(directory), {"alone": {"save_strategy": "no"}}).values()
    assert isinstance(course, Course)
    assert len(course.losses) == hosts.STEPS
    return course


def with_resumed(directory: Path, **wish: Any) -> dict[str, dict[str, Any]]:
    """A run, and another that goes on from its checkpoint, which lies within a visit."""
    whole = directory / "whole"
    return {
        "whole": {**wish, "output_dir": str(whole)},
        "resumed": {**wish, "output_dir": str(directory / "resumed"), "resume": str(whole)},
    }


def assert_trained_as(course: Course | str, expected: Course, *, exactly: bool = False) -> None:
    """Losses, norms and the weights after each visit, so that no update of one is lost."""
    assert isinstance(course, Course), course
    close = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-5, "atol": 0}
    torch.testing.assert_close(course.losses, expected.losses, **close)
    torch.testing.assert_close(course.norms, expected.norms, **(close if exactly else {"rtol": 1e-4, "atol": 0}))
    for weights, others in zip(reversed(course.visits), reversed(expected.visits), strict=False):
        torch.testing.assert_close(weights, others, rtol=0, atol=0 if exactly else 1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not ZERO3, reason="needs deepspeed")
@pytest.mark.parametrize("host", ["late", "factory"])
def test_under_zero3_a_trainer_trains_as_one_process_and_resumes_within_a_visit(
    directory: Path, alone: Course, tmp_path: Path, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    wishes = with_resumed(tmp_path, host=host, deepspeed=hosts.ZERO3, use_cpu=False)
    for found in on_ranks(2, hosts.courses, directory=str(directory), wishes=wishes):
        assert len(found["whole"].visits) == hosts.STEPS // hosts.EVERY
        assert_trained_as(found["whole"], alone)
        assert_trained_as(found["resumed"], found["whole"], exactly=True)
        assert len(found["resumed"].visits) == (hosts.STEPS - hosts.STOP) // hosts.EVERY + 1


def test_behind_ddp_a_trainer_trains_as_one_process_and_resumes_within_a_visit(
    directory: Path, alone: Course, tmp_path: Path
) -> None:
    wishes = with_resumed(tmp_path)
    wishes["checkpointed"] = {"gradient_checkpointing": True, "output_dir": str(tmp_path), "save_strategy": "no"}
    wishes["fsdp2"] = {"fsdp": True, "fsdp_config": hosts.FSDP2, "output_dir": str(tmp_path), "save_strategy": "no"}
    wishes["without callback"] = {"host": "unaware", "output_dir": str(tmp_path), "save_strategy": "no"}
    for found in on_ranks(2, hosts.courses, directory=str(directory), wishes=wishes):
        assert_trained_as(found["whole"], alone)
        assert_trained_as(found["resumed"], found["whole"], exactly=True)
        assert_trained_as(found["checkpointed"], alone)
        assert "DistributedDataParallel averages the gradients of the first block alone" in found["without callback"]
        assert "The parameters were replaced after this optimizer was built" in found["fsdp2"]


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="its Trainer knows no sharded models")
def test_a_trainer_trains_a_model_that_was_sharded_as_it_was_read_like_one_process(
    directory: Path, alone: Course, tmp_path: Path
) -> None:
    common = {"host": "given", "save_only_model": True, "distributed_config": DistributedConfig(fsdp_size=2)}
    wishes = {
        "whole": {**common, "output_dir": str(tmp_path / "whole")},
        "checkpointed": {**common, "gradient_checkpointing": True, "output_dir": str(tmp_path / "checkpointed")},
    }
    for found in on_ranks(2, hosts.courses, directory=str(directory), wishes=wishes):
        for course in found.values():
            assert_trained_as(course, alone)
            assert course.gathers == GATHERS
    saved = load_file(tmp_path / "whole" / f"checkpoint-{hosts.STEPS}" / "model.safetensors")
    torch.testing.assert_close(saved, alone.visits[-1], rtol=0, atol=1e-5)

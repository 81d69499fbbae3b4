"""Runs that are stopped, killed or out of disk: nothing half-written, one sentence, and they go on as the same run."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from badam.errors import InputError
from badam.training.interruption import Interruption, Stopped
from badam.training.options import RunOptions
from badam.training.progress import EvaluationView, MetricsFile
from badam.training.run_callback import RunCallback
from badam.training.run_directory import prepare_output, removed_if_unused
from tests.badam.training.tiny import run_tiny, tiny_plan

STEPS = 4
LINE = EvaluationView(step=1, loss=2.5, accuracy=None)


def weights(directory: Path) -> bytes:
    return (directory / "run" / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    run_tiny(tiny_plan(), directory, max_steps=STEPS, save_steps=STEPS)
    return directory


def test_a_run_that_died_while_it_wrote_the_model_writes_it_when_resumed(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "again")
    shutil.rmtree(tmp_path / "again/run/model")
    result, _ = run_tiny(tiny_plan(), tmp_path / "again", max_steps=STEPS, save_steps=STEPS, resume=True)
    assert weights(tmp_path / "again") == weights(whole)
    assert result.measured is not None, "what the run before has measured"
    assert result.measured.measurement.steps == STEPS
    with pytest.raises(InputError, match="has had 4 of 4 steps already"):
        run_tiny(tiny_plan(), tmp_path / "again", max_steps=STEPS, save_steps=STEPS, resume=True)


def test_a_signal_in_the_last_step_changes_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = RunCallback.on_step_end

    def signalled(self: RunCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STEPS:
            signal.raise_signal(signal.SIGTERM)
        usual(self, args, state, control, **kwargs)

    monkeypatch.setattr(RunCallback, "on_step_end", signalled)
    result, _ = run_tiny(tiny_plan(), tmp_path, max_steps=STEPS, save_steps=STEPS)
    assert result.stopped_by is None
    assert weights(tmp_path) == weights(whole)


def test_a_signal_before_training_ends_the_run_and_leaves_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signalled(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("badam.training.run.load_inputs", signalled)
    with pytest.raises(Stopped, match="stopped by SIGTERM before training began"):
        run_tiny(tiny_plan(), tmp_path, max_steps=STEPS)
    assert not (tmp_path / "run").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_is_noted_once_training_has_begun_and_a_second_ctrl_c_acts() -> None:
    with Interruption() as interruption:
        interruption.postpone()
        signal.raise_signal(signal.SIGINT)
        assert interruption.signal is signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_line_that_was_torn_is_cut_off_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    file = MetricsFile(path)
    file.append(LINE)
    file.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 1]


def test_a_full_disk_is_a_sentence_for_a_line_too(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    file = MetricsFile(path)
    with pytest.raises(InputError, match=r"metrics.jsonl could not be written: No space left on device. .* --resume"):
        file.append(LINE)
    file.close()


def test_what_a_killed_run_was_writing_is_removed_and_what_it_was_replacing_comes_back(tmp_path: Path) -> None:
    for name in (".checkpoint-4.partial", ".data-ab.partial", ".model.old.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / ".plan.json.17.tmp").touch()
    prepare_output(tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "file").exists()


def test_a_failed_run_leaves_no_empty_directory_but_the_users(tmp_path: Path) -> None:
    def fail_in(directory: Path) -> None:
        with removed_if_unused(directory):
            directory.mkdir(parents=True, exist_ok=True)
            raise InputError("No.")

    (tmp_path / "users").mkdir()
    for directory in ("users", "new/run"):
        with pytest.raises(InputError):
            fail_in(tmp_path / directory)
    assert [path.name for path in tmp_path.iterdir()] == ["users"]


def test_two_runs_in_one_directory_keep_their_data_apart(tmp_path: Path) -> None:
    """They may be processes of the same number on two machines."""
    assert RunOptions(output_dir=tmp_path).data_directory != RunOptions(output_dir=tmp_path).data_directory

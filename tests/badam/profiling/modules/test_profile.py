"""What full mode leaves behind, on the CPU and on a card that is played."""

from __future__ import annotations

import gzip
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import badam.profiling
from badam.errors import BadamError, InputError, PlanError
from badam.plan import Plan, record_digest
from badam.profiling.modules import profile as full_profile
from badam.profiling.modules.profile import SNAPSHOT_FILE, AllocatorHistory
from badam.profiling.modules.record import (
    MODULES_FILE,
    ModuleTimelines,
    StepModules,
    load_module_timelines,
    save_module_timelines,
)
from badam.profiling.recorder import Recording
from badam.training.build import build_model, build_optimizer
from badam.training.losses import forward_loss
from badam.vocabulary import Phase, Profile
from tests.badam.training.tiny import LAYERS, run_tiny, tiny_plan


def recorded(plan: Plan, profile: Profile, steps: int = 2 * LAYERS) -> Recording:
    torch.manual_seed(0)
    model = build_model(plan.model, plan.training, weights=None)
    optimizer = build_optimizer(model, plan)
    tokens = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    with badam.profiling.record(optimizer, model, plan=plan, profile=profile) as run:
        for _ in range(steps):
            loss = forward_loss(model, {"input_ids": tokens, "labels": tokens}, "full")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.note(loss=loss.item())
            del loss
    return run


def test_a_loop_in_full_mode_leaves_one_step_of_each_block_module_by_module(tmp_path: Path) -> None:
    plan = tiny_plan()
    run = recorded(plan, "full")
    run.save(tmp_path / "measured.json")
    timelines = load_module_timelines(tmp_path / MODULES_FILE)
    assert [step.block for step in timelines.steps] == [block.name for block in plan.partition.blocks]
    assert timelines.plan_digest == record_digest(plan)
    for step in timelines.steps:
        memory = run.steps[step.step].memory
        assert memory is not None
        # What a step allocated between two steps belongs to none of its modules.
        within = {phase: peak for phase, peak in memory.peak_by_phase.items() if phase is not Phase.SETUP}
        assert step.highest_bytes == max(within.values())
        whole: dict[Phase, int] = {}
        for span in timelines.spans(step):
            if not span.module:  # a switch divides the phase that it interrupts
                whole[span.phase] = max(whole.get(span.phase, 0), span.peak_bytes)
        assert whole == {phase: peak for phase, peak in within.items() if phase is not Phase.RECOMPUTE}


def test_a_span_tells_bytes_before_after_and_between(tmp_path: Path) -> None:
    run = recorded(tiny_plan(), "full")
    run.save_profile(tmp_path)
    timelines = load_module_timelines(tmp_path / MODULES_FILE)
    spans = list(timelines.spans(timelines.worst))
    (up,) = (one for one in spans if one.module == "model.layers.0.mlp.up_proj" and one.phase is Phase.FORWARD)
    made = 2 * 16 * 48 * 2  # batch x length x intermediate, in bf16
    assert made <= up.after_bytes - up.before_bytes <= up.peak_bytes - up.before_bytes
    assert all(one.peak_bytes >= max(one.before_bytes, one.after_bytes) for one in spans)
    assert all(one.seconds >= 0 for one in spans)


def test_full_mode_measures_the_peaks_of_normal_mode() -> None:
    plan = tiny_plan(checkpointed=True)
    peaks = []
    for profile in ("normal", "full"):
        run = recorded(plan, profile)
        memories = [step.memory for step in run.steps]
        floor = min(min(memory.peak_by_phase.values()) for memory in memories if memory is not None)
        peaks.append([memory.peak_bytes - floor for memory in memories if memory is not None])
    assert peaks[0] == peaks[1]


def test_normal_mode_leaves_no_profile(tmp_path: Path) -> None:
    assert recorded(tiny_plan(), "normal", steps=1).save_profile(tmp_path) == []


def test_a_run_in_full_mode_leaves_the_record_beside_its_measurement(tmp_path: Path) -> None:
    run_tiny(tiny_plan(), tmp_path, max_steps=2 * LAYERS, profile="full")
    timelines = load_module_timelines(tmp_path / "run" / MODULES_FILE)
    assert [step.step for step in timelines.steps] == [1, 3, 5]  # the second of each visit
    assert (tmp_path / "run" / MODULES_FILE).stat().st_size < 20_000


def small_record(**changes: Any) -> ModuleTimelines:
    columns: dict[str, Any] = {
        "microseconds": (0, 5, 9),
        "live_bytes": (10, 20, 15),
        "peak_bytes": (10, 30, 20),
        "module": (0, 1),
        "phase": (0, 0),
        "begin": (0, 0),
        "end": (2, 1),
    }
    step = StepModules(step=0, block="a", **{**columns, **changes})
    return ModuleTimelines(plan_digest="", names=("", "layer"), phases=(Phase.FORWARD,), steps=(step,))


def test_the_same_record_is_the_same_file(tmp_path: Path) -> None:
    for name in ("one", "other"):
        save_module_timelines(small_record(), tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    assert load_module_timelines(tmp_path / "one") == small_record()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"end": (2, 3)}, "no boundary"),
        ({"begin": (0, 2)}, "ends before it begins"),
        ({"live_bytes": (1, 2)}, "columns of boundaries"),
        ({"phase": (0,)}, "columns of spans"),
        ({"module": (0, 2)}, "without a name"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small_record(**changes)


def test_files_that_are_no_record_are_refused_in_a_sentence(tmp_path: Path) -> None:
    good = tmp_path / "good"
    save_module_timelines(small_record(), good)
    contents = {
        "text": b"hello",
        "cut": good.read_bytes()[:40],
        "other": gzip.compress(b'{"schema_version": 1}'),
        "no json": gzip.compress(b"hello"),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PlanError, match="module timelines"):
            load_module_timelines(tmp_path / name)
    with pytest.raises(PlanError, match="Cannot read"):
        load_module_timelines(tmp_path / "absent")
    with pytest.raises(InputError, match="Cannot write"):
        save_module_timelines(small_record(), tmp_path / "absent" / MODULES_FILE)


class Played:
    """torch's two functions: remembers the calls, and writes a file that says how many steps it has seen."""

    def __init__(self) -> None:
        self.enabled: list[str | None] = []
        self.steps = 0

    def record(self, enabled: str | None = "all", **options: Any) -> None:
        assert set(options) <= {"context", "stacks", "max_entries", "clear_history"}
        self.enabled.append(enabled)
        self.steps += enabled == "all"

    def dump(self, filename: str) -> None:
        Path(filename).write_text(f"step {self.steps}")


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    player = Played()
    memory = SimpleNamespace(_record_memory_history=player.record, _dump_snapshot=player.dump)
    monkeypatch.setattr(full_profile, "torch", SimpleNamespace(cuda=SimpleNamespace(memory=memory)))
    return player


def test_the_allocator_history_of_the_highest_step_is_kept(played: Played, tmp_path: Path) -> None:
    history = AllocatorHistory()
    history.start()
    for peak in (5, 9, 7):
        history.begin_step()
        history.end_step(peak)
    history.stop()
    assert played.enabled == ["state", *["all", "state"] * 3, None]
    assert history.save(tmp_path) == tmp_path / SNAPSHOT_FILE
    assert (tmp_path / SNAPSHOT_FILE).read_text() == "step 2"


def test_the_history_of_a_step_that_memory_has_ended_is_kept(played: Played, tmp_path: Path) -> None:
    history = AllocatorHistory()
    history.start()
    history.begin_step()
    history.end_step(9)
    history.begin_step()
    history.stop()
    history.save(tmp_path)
    assert (tmp_path / SNAPSHOT_FILE).read_text() == "step 2"


def test_a_run_on_cuda_leaves_a_snapshot_beside_its_record(
    played: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU's memory and clock, with the history of a card that is played."""
    made = full_profile.FullProfile.__init__

    def on_cuda(self: full_profile.FullProfile, device: torch.device, *arguments: Any) -> None:
        made(self, device, *arguments)
        self._history = AllocatorHistory()

    monkeypatch.setattr(full_profile.FullProfile, "__init__", on_cuda)
    written = recorded(tiny_plan(), "full").save_profile(tmp_path)
    assert [path.name for path in written] == [MODULES_FILE, SNAPSHOT_FILE]
    assert played.enabled[0] == "state"
    assert played.enabled.count("all") == 2 * LAYERS
    assert played.enabled[-1] is None


def test_the_snapshot_functions_take_what_they_are_given() -> None:
    """Where there is no CUDA torch refuses the call itself, and not its arguments."""
    if torch.cuda.is_available():
        pytest.skip("for machines without CUDA")
    for call in (AllocatorHistory.start, AllocatorHistory.begin_step, AllocatorHistory.stop):
        with pytest.raises((RuntimeError, AttributeError, AssertionError)) as refusal:
            call(AllocatorHistory())
        assert "argument" not in str(refusal.value)
    assert issubclass(BadamError, Exception)

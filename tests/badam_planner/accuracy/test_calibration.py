from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from badam.errors import InputError, PlanError
from badam.files import DATA_DIRECTORY
from badam.plan import PhaseWork, Plan, Rates, Target
from badam.profiling.record import Machine, MeasuredRun
from badam.units import GIB, MIB
from badam.vocabulary import Phase
from badam_planner.accuracy.calibration import Calibration, calibrate, calibrated
from badam_planner.sources.calibration_store import (
    calibration_path,
    device_key,
    load_calibration,
    save_calibration,
)
from tests.badam_planner import factories

TARGET = Target(gpu="rtx3090", total_bytes=24 * GIB, usable_bytes=23 * GIB, context_bytes=GIB, workspace_bytes=8 * MIB)


def pair(
    *, allocated: int = 0, reserved: int = 0, device: int | None = 0, date: str = "", **measurement: Any
) -> tuple[Plan, MeasuredRun]:
    """A run that needed so many bytes more than its plan says: allocated, reserved beyond it, outside torch."""
    plan = factories.plan(target=TARGET)
    measured = {
        "peak_allocated_bytes": 20 * GIB + allocated,
        "peak_reserved_bytes": 21 * GIB + allocated + reserved,
        "peak_device_bytes": None if device is None else 22 * GIB + allocated + reserved + device,
        **measurement,
    }
    provenance = factories.PROVENANCE.model_copy(update={"date": date})
    return plan, factories.measured_run(plan, measurement=measured, provenance=provenance)


def test_context_workspace_and_residual_are_told_apart() -> None:
    found = calibrate("rtx3090", [pair(allocated=2 * MIB, reserved=16 * MIB, device=-512 * MIB)])
    assert found.context_bytes == 512 * MIB
    assert found.workspace_bytes == 10 * MIB
    assert found.reserved_residual_bytes == 16 * MIB


def test_figures_are_medians_over_the_runs() -> None:
    found = calibrate("rtx3090", [pair(device=extra) for extra in (0, 64 * MIB, 900 * MIB)])
    assert found.context_bytes == GIB + 64 * MIB


def test_margin_of_one_run_is_what_its_plan_fell_short() -> None:
    assert calibrate("rtx3090", [pair(device=100 * MIB)]).margin_bytes == 100 * MIB
    assert calibrate("rtx3090", [pair(device=-100 * MIB)]).margin_bytes == 0


def test_what_all_runs_show_alike_is_no_shortfall() -> None:
    found = calibrate("rtx3090", [pair(allocated=2 * MIB, date=date) for date in ("a", "b")])
    assert len(found.samples) == 2
    assert (found.workspace_bytes, found.margin_bytes) == (10 * MIB, 0)


def test_margin_judges_each_run_by_the_others() -> None:
    found = calibrate("rtx3090", [pair(device=100 * MIB), pair(device=130 * MIB)])
    assert found.margin_bytes == 30 * MIB


@given(st.lists(st.tuples(*[st.integers(-8 * MIB, 512 * MIB)] * 3), min_size=2, max_size=6, unique=True))
def test_margin_covers_every_run_as_the_others_would_plan_it(
    extras: list[tuple[int, int, int]],
) -> None:
    pairs = [pair(allocated=one, reserved=two, device=three) for one, two, three in extras]
    found = calibrate("rtx3090", pairs)
    for index, sample in enumerate(found.samples):
        others = calibrate("rtx3090", [*pairs[:index], *pairs[index + 1 :]])
        assert others.context_bytes is not None
        assert others.workspace_bytes is not None
        assert sample.shortfall_bytes(others.context_bytes, others.workspace_bytes) <= found.margin_bytes


def test_a_run_counts_once_however_often_it_is_added() -> None:
    first = calibrate("rtx3090", [pair(device=MIB)])
    again = calibrate("rtx3090", [pair(device=MIB), pair(device=2 * MIB)], first)
    assert len(again.samples) == 2


def test_a_calibrated_target_offers_less_by_the_margin_and_keeps_what_was_not_measured() -> None:
    found = calibrate("rtx3090", [pair(device=100 * MIB)])
    target = calibrated(TARGET, found)
    assert target.context_bytes == GIB + 100 * MIB
    assert target.usable_bytes == 23 * GIB - 100 * MIB
    blind = calibrate("cpu", [pair(device=None, peak_reserved_bytes=None)])
    assert calibrated(TARGET, blind).context_bytes == TARGET.context_bytes
    assert calibrated(TARGET, blind).workspace_bytes == TARGET.workspace_bytes


def test_where_only_tensors_are_measured_the_margin_is_theirs() -> None:
    found = calibrate("cpu", [pair(allocated=7 * MIB, device=None, peak_reserved_bytes=None)])
    assert (found.context_bytes, found.workspace_bytes, found.margin_bytes) == (None, None, 7 * MIB)
    assert found.sentence() == "Calibrated by 1 run on NVIDIA GeForce RTX 3090: margin 7.00 MiB."


WORK = {
    Phase.FORWARD: PhaseWork(flops=9_000, product_bytes=10, other_bytes=100, operators=5),
    Phase.LOSS: PhaseWork(flops=1_000, product_bytes=10, other_bytes=100, operators=5),
    Phase.STEP: PhaseWork(flops=0, product_bytes=0, other_bytes=400, operators=1),
}


def pair_with_work(**seconds: float) -> tuple[Plan, MeasuredRun]:
    plan, _ = pair()
    assert plan.prediction is not None
    plan = plan.model_copy(update={"prediction": plan.prediction.model_copy(update={"work_by_phase": WORK})})
    by_phase = {Phase(name): spent for name, spent in seconds.items()}
    return plan, factories.measured_run(plan, measurement={"seconds_by_phase": by_phase})


def test_rates_are_those_with_which_the_plan_would_have_said_what_was_measured() -> None:
    found = calibrate("rtx3090", [pair_with_work(forward=1.5, loss=1.0, step=1.0)])
    assert found.bytes_per_second == 400
    assert found.flops_per_second == {"bfloat16": 10_000 / (2.5 - 200 / 400)}
    rates = calibrated(TARGET, found).rates
    assert rates is not None
    assert (rates.bytes_per_second, rates.flops_per_second["float32"]) == (400, 5_000)
    assert "1 measured run" in rates.basis


def test_rates_of_other_types_stay_as_assumed() -> None:
    assumed = Rates(flops_per_second={"bfloat16": 7.0, "float32": 3.0}, bytes_per_second=1.0, basis="assumed")
    found = calibrate("rtx3090", [pair_with_work(forward=1.5, loss=1.0, step=1.0)])
    rates = calibrated(TARGET.model_copy(update={"rates": assumed}), found).rates
    assert rates is not None
    assert rates.flops_per_second == {"bfloat16": 5_000, "float32": 3.0}


def test_rates_are_unknown_where_no_time_was_measured() -> None:
    found = calibrate("rtx3090", [pair(blocks=(), seconds_by_phase={}), pair_with_work(forward=0.1, step=1.0)])
    assert found.flops_per_second == {}
    assert calibrated(TARGET, found).rates is None


def test_runs_of_two_devices_are_refused() -> None:
    plan, run = pair()
    other = run.model_copy(update={"machine": run.machine.model_copy(update={"device_name": "NVIDIA L4"})})
    with pytest.raises(InputError, match="NVIDIA GeForce RTX 3090, NVIDIA L4"):
        calibrate("rtx3090", [(plan, run), (plan, other)])


def test_a_run_without_its_own_plan_is_refused() -> None:
    _, run = pair()
    with pytest.raises(InputError, match="is not the one that the run was started with"):
        calibrate("rtx3090", [(factories.plan(method="badam-ratio"), run)])


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(DATA_DIRECTORY, str(tmp_path / "data"))
    return tmp_path / "data"


def test_what_is_stored_comes_back(store: Path) -> None:
    found = calibrate("rtx3090", [pair(device=MIB)])
    path = save_calibration(found)
    assert path.is_relative_to(store)
    assert load_calibration("NVIDIA GeForce RTX 3090".replace("NVIDIA GeForce ", "")) == found
    assert load_calibration("a100") is None


def test_a_broken_file_is_named_with_what_to_do(store: Path) -> None:
    path = calibration_path("rtx3090")
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(PlanError, match="badam-report --calibrate"):
        load_calibration("rtx3090")


def test_a_directory_that_cannot_be_made_is_named(store: Path) -> None:
    store.write_text("a file where the directory should be")
    with pytest.raises(InputError, match=r"Cannot write .*BADAM_DATA_DIR"):
        save_calibration(calibrate("rtx3090", [pair()]))


def test_without_the_variable_the_users_data_directory_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(DATA_DIRECTORY, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert calibration_path("cpu") == tmp_path / "badam" / "calibration" / "cpu.json"


def test_devices_go_by_the_name_that_plans_use() -> None:
    machine = Machine(
        device="cuda", device_name="NVIDIA GeForce RTX 3090", device_total_bytes=1, cpu_count=1, platform="Linux"
    )
    assert device_key(machine) == "rtx3090"
    assert device_key(machine.model_copy(update={"device_name": "Unheard-of 9"})) == "Unheard-of 9"
    assert device_key(machine.model_copy(update={"device": "cpu"})) == "cpu"


def test_a_calibration_rests_on_at_least_one_run() -> None:
    with pytest.raises(ValueError, match="samples"):
        Calibration(gpu="cpu", device_name="x", device_total_bytes=1, samples=())

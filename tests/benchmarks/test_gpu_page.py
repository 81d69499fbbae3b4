"""The documentation's page about GPUs, from records; and predictions made again for old records."""

from __future__ import annotations

from pathlib import Path

import pytest

from badam.plan import Plan, load_plan, save_record
from badam.profiling.record import load_measured
from badam.units import GIB, MIB
from badam_planner.accuracy.compare import compare
from benchmarks.gpu import predict, table
from benchmarks.gpu.draws import BudgetRecord
from benchmarks.gpu.figures import rivals, rows, spreads
from benchmarks.gpu.page import NONE_YET, page, segment_bytes
from benchmarks.gpu.record import Assumptions, CaseRecord, Scratch, load_case, plain_provenance, record_path
from benchmarks.gpu.worker import Job, run_case
from tests.benchmarks.test_gpu_budget import outcome
from tests.benchmarks.tiny import GPU_MACHINE, as_on_a_gpu, case, write_model


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> CaseRecord:
    """A case measured in this process."""
    directory = tmp_path_factory.mktemp("page")
    chosen = case(write_model(directory))
    record = run_case(chosen, Job(chosen, "cpu", directory, "the command"), lambda: None)
    assert record.outcome == "measured", record.message
    return record


@pytest.fixture
def on_gpu(on_cpu: CaseRecord) -> CaseRecord:
    """The same as if a card had measured it: reserved 1 % and device 2 % above what was predicted."""
    assert on_cpu.plan is not None
    assert on_cpu.plan.prediction is not None
    predicted = on_cpu.plan.prediction
    return as_on_a_gpu(
        on_cpu,
        reserved=round(predicted.peak_reserved_bytes * 1.01),
        device=round(predicted.peak_device_bytes * 1.02),
    )


def save(record: CaseRecord, directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = record_path(directory, record.case.name)
    save_record(record, path)
    return path


def page_of(root: Path, tmp_path: Path) -> str:
    assert table.main(["--records", str(root), "--page", str(tmp_path / "page.md")]) == 0
    return (tmp_path / "page.md").read_text()


def test_the_page_in_the_documentation_is_the_one_that_the_records_make() -> None:
    assert table.main(["--check"]) == 0


def test_without_records_of_a_card_the_page_claims_nothing(on_cpu: CaseRecord, tmp_path: Path) -> None:
    save(on_cpu, tmp_path / "records")
    (tmp_path / "records" / "other.json").write_text("{}")
    text = page_of(tmp_path / "records", tmp_path)
    assert text.endswith(NONE_YET)
    assert "|" not in text


def test_errors_are_predicted_less_measured_of_every_total(on_gpu: CaseRecord) -> None:
    (row,) = rows([on_gpu])
    by_name = {spread.name: spread for spread in spreads([row])}
    assert by_name["reserved"].worst == pytest.approx(1 / 1.01 - 1, abs=1e-4)
    assert by_name["device"].worst == pytest.approx(1 / 1.02 - 1, abs=1e-4)
    measured = on_gpu.run.measurement.peak_allocated_bytes if on_gpu.run else 0
    assert by_name["allocated"].worst == pytest.approx(peak(on_gpu.plan) / measured - 1)
    assert by_name["reserved"].median == -by_name["reserved"].worst


def test_where_nvml_tells_of_the_whole_card_the_context_comes_from_cuda(on_cpu: CaseRecord) -> None:
    record = as_on_a_gpu(on_cpu, reserved=10 * MIB, device=GIB, source="NVML, whole card (no processes)")
    (row,) = rows([record])
    assert row.total("device").measured == 410 * MIB


def test_the_page_shows_each_case_with_its_errors_the_median_and_the_worst(on_gpu: CaseRecord, tmp_path: Path) -> None:
    save(on_gpu, tmp_path / "records" / "h200")
    text = page_of(tmp_path / "records", tmp_path)
    assert "## NVIDIA H200" in text
    assert "    the command" in text
    (line,) = (line for line in text.splitlines() if line.startswith(f"| `{on_gpu.case.name}` | 0.00 / 0.00"))
    assert line.count("|") == 9
    assert "-0.99%" in line
    assert f"| device | 1 | 1.96% | -1.96% (`{on_gpu.case.name}`) |" in text


def test_the_page_is_checked_against_the_records(on_gpu: CaseRecord, tmp_path: Path) -> None:
    save(on_gpu, tmp_path / "records")
    arguments = ["--records", str(tmp_path / "records"), "--page", str(tmp_path / "page.md")]
    assert table.main([*arguments, "--check"]) == 1
    assert table.main(arguments) == 0
    assert table.main([*arguments, "--check"]) == 0
    (tmp_path / "page.md").write_text("other")
    assert table.main([*arguments, "--check"]) == 1


def test_a_case_that_ran_out_of_memory_stands_beside_what_was_predicted(on_gpu: CaseRecord, tmp_path: Path) -> None:
    refused = on_gpu.model_copy(update={"outcome": "out of memory", "run": None, "message": "Out of memory in x; y"})
    save(refused, tmp_path / "records")
    text = page_of(tmp_path / "records", tmp_path)
    assert ": fits | Out of memory in x |" in text
    assert "### Peak memory" not in text


def test_badam_1_4_stands_beside_this_optimizer_and_not_among_the_predictions(
    on_gpu: CaseRecord, tmp_path: Path
) -> None:
    old = on_gpu.model_copy(update={"case": on_gpu.case.model_copy(update={"side": "badam-1.4"})})
    assert len(rows([old])) == 0
    assert [(pair.own, pair.old) for pair in rivals([old, on_gpu])] == [(on_gpu, old)]
    save(old, tmp_path / "records")
    save(on_gpu, tmp_path / "records")
    text = page_of(tmp_path / "records", tmp_path)
    assert f"| `{on_gpu.case.name}` | 1.4 |" in text


def test_assumptions_stand_beside_what_was_measured(on_gpu: CaseRecord, tmp_path: Path) -> None:
    found = Assumptions(
        machine=GPU_MACHINE,
        provenance=plain_provenance("ask"),
        nvml_source="NVML, this process",
        idle_bytes=None,
        context_bytes={"first kernel": 400 * MIB},
        nvml_context_bytes={},
        workspace_bytes={"product": 32 * MIB},
        scratch=(
            Scratch(operation="attention backward, default", shape="1", kernel="K", scratch_bytes=5 * MIB,
                    result_bytes=0, assumed_bytes=4 * MIB),
        ),
        segment_bytes={"1": 2 * MIB},
        allocator={"backend": "native"},
    )  # fmt: skip
    save(on_gpu, tmp_path / "records")
    save_record(found, tmp_path / "records" / "assumptions.json")
    text = page_of(tmp_path / "records", tmp_path)
    assert "| context after: first kernel | 0 B | 400.00 MiB |" in text
    assert "| scratch of attention backward, default, 1 (`K`) | 4.00 MiB | 5.00 MiB |" in text
    assert "| reserved for a request of 1 B | 2.00 MiB | 2.00 MiB |" in text
    assert segment_bytes(10 * MIB + 1) == 12 * MIB


def test_decisions_near_a_limit_are_counted(tmp_path: Path) -> None:
    record = BudgetRecord(
        outcomes=(outcome(fraction=1.01, ran=False), outcome(fraction=0.99, ran=False)),
        machine=GPU_MACHINE,
        provenance=plain_provenance("budget"),
    )
    (tmp_path / "records").mkdir()
    save_record(record, tmp_path / "records" / "budget-0000.json")
    assert "2 of 2 draws: 1 wrong fits, 0 false refusals" in page_of(tmp_path / "records", tmp_path)


def test_exported_plans_and_runs_are_what_badam_report_reads(on_gpu: CaseRecord, tmp_path: Path) -> None:
    save(on_gpu, tmp_path / "records")
    assert table.main(["--records", str(tmp_path / "records"), "--export", str(tmp_path / "pairs")]) == 0
    plan = load_plan(tmp_path / "pairs" / f"{on_gpu.case.name}.plan.json")
    run = load_measured(tmp_path / "pairs" / f"{on_gpu.case.name}.measured.json")
    assert not any("another plan file" in note for note in compare(plan, run).notes)


def test_a_later_prediction_stands_beside_the_first_and_is_the_one_shown(on_gpu: CaseRecord, tmp_path: Path) -> None:
    assert on_gpu.plan is not None
    assert on_gpu.plan.prediction is not None
    wrong = on_gpu.plan.prediction.model_copy(update={"peak_allocated_bytes": 1})
    path = save(on_gpu.model_copy(update={"plan": on_gpu.plan.model_copy(update={"prediction": wrong})}), tmp_path)
    assert predict.main([str(tmp_path)]) == 0
    renewed = load_case(path)
    assert peak(renewed.plan) == 1
    assert peak(renewed.repredicted) == on_gpu.plan.prediction.peak_allocated_bytes
    assert renewed.run == on_gpu.run
    (row,) = rows([renewed])
    assert row.total("allocated").predicted == peak(renewed.repredicted)


def peak(plan: Plan | None) -> int:
    assert plan is not None
    assert plan.prediction is not None
    return plan.prediction.peak_allocated_bytes


def test_the_page_of_the_null_device_is_what_its_records_make_and_claims_neither_time_nor_device_memory() -> None:
    assert table.main(["--null-device", "--check"]) == 0
    text = table.NULL_PAGE.read_text(encoding="utf-8")
    assert "(null device)" in text
    assert "device | error" not in text
    assert "tokens/s" not in text


def test_records_of_the_null_device_never_stand_beside_those_of_gpus() -> None:
    found = table.machines(table.NULL_RECORDS)
    with pytest.raises(ValueError, match="do not belong on this page"):
        page(found)

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from badam.errors import InputError
from badam.plan import Plan, save_record
from badam.units import GIB
from badam_cli.report import app
from badam_planner.report.html import gather
from tests.badam_planner import factories
from tests.badam_planner.report.html.pages import step_timeline


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    save_record(factories.plan(), path)
    return path


@pytest.fixture
def measured_file(tmp_path: Path) -> Path:
    path = tmp_path / "measured.json"
    save_record(factories.measured_run(), path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "100"})


def test_within_tolerance_ends_with_0_and_shows_the_tables(plan_file: Path, measured_file: Path) -> None:
    result = run(plan_file, measured_file)
    assert result.exit_code == 0
    assert "WITHIN tolerance (5%)" in result.stdout
    assert "activation and rest" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("tolerance", ["1%", "1", " 0.5 % "])
def test_beyond_tolerance_ends_with_1(plan_file: Path, measured_file: Path, tolerance: str) -> None:
    result = run(plan_file, measured_file, "--tolerance", tolerance)
    assert result.exit_code == 1
    assert "OVER tolerance" in result.stdout


def test_json_is_alone_on_stdout_and_holds_the_figures(plan_file: Path, measured_file: Path) -> None:
    content = json.loads(run(plan_file, measured_file, "--json").stdout)
    assert content["verdict"]["passed"] is True
    assert content["totals"][0] == {
        "name": "allocated",
        "predicted_bytes": 20 * GIB,
        "measured_bytes": 20 * GIB + GIB // 4,
        "error_bytes": -GIB // 4,
        "error_fraction": pytest.approx(-0.25 / 20.25),
    }
    measured = [part["measured_bytes"] for part in content["categories"]]
    assert sum(measured) == content["totals"][0]["measured_bytes"]


def test_several_runs_give_a_table_of_accuracy(plan_file: Path, measured_file: Path, tmp_path: Path) -> None:
    worse = tmp_path / "worse.json"
    save_record(factories.measured_run(measurement={"peak_allocated_bytes": 25 * GIB}), worse)
    result = run(plan_file, measured_file, worse)
    assert result.exit_code == 1
    assert "median error 10.62%" in result.stdout
    assert "worst: run 2" in result.stdout
    content = json.loads(run(plan_file, measured_file, worse, "--json").stdout)
    assert content["accuracy"]["worst_run"] == 1
    assert len(content["comparisons"]) == 2


def test_each_run_is_compared_with_its_own_plan(plan_file: Path, measured_file: Path, tmp_path: Path) -> None:
    plan = factories.plan(model=factories.model("acme/other", num_hidden_layers=5))
    save_record(plan, tmp_path / "other.json")
    save_record(factories.measured_run(plan), tmp_path / "other-measured.json")
    result = run(plan_file, measured_file, tmp_path / "other.json", tmp_path / "other-measured.json", "--json")
    assert result.exit_code == 0
    assert [one["model"] for one in json.loads(result.stdout)["comparisons"]] == ["acme/tiny-7b", "acme/other"]


def test_directories_of_runs_are_read_with_the_plans_in_them(tmp_path: Path) -> None:
    for name in ("acme/one", "acme/two"):
        plan = factories.plan(model=factories.model(name, hidden_size=len(name) + ord(name[-1])))
        folder = tmp_path / name.replace("/", "-")
        folder.mkdir()
        save_record(plan, folder / "plan.json")
        save_record(factories.measured_run(plan), folder / "measured.json")
    alone = run(tmp_path / "acme-one")
    assert alone.exit_code == 0
    assert "acme/one" in alone.stdout
    both = run(tmp_path / "acme-one", tmp_path / "acme-two", "--json")
    assert both.exit_code == 0
    assert [one["model"] for one in json.loads(both.stdout)["comparisons"]] == ["acme/one", "acme/two"]


def test_a_directory_without_a_run_is_bad_input(plan_file: Path, tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.exit_code == 2
    assert "holds no measured.json" in result.stderr


@pytest.mark.parametrize("tolerance", ["much", "-1", "nan", "inf", ""])
def test_a_tolerance_that_is_no_percentage_is_bad_input(plan_file: Path, measured_file: Path, tolerance: str) -> None:
    result = run(plan_file, measured_file, f"--tolerance={tolerance}")
    assert result.exit_code == 2
    assert "is not a percentage" in result.stderr
    assert result.stdout == ""


def test_files_that_cannot_be_read_get_a_sentence(plan_file: Path, measured_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text(measured_file.read_text()[:200])
    for arguments, words in (
        ((tmp_path / "absent.json", measured_file), "Cannot read the plan"),
        ((plan_file, tmp_path / "absent.json"), "Cannot read the measured run"),
        ((plan_file, broken), "not complete JSON"),
        ((measured_file, plan_file), "is a measured run, not a plan"),
        ((plan_file, plan_file), "Only plans were given"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert words in result.stderr
        assert "Traceback" not in result.stderr
        assert result.stdout == ""


def test_a_run_of_another_model_is_bad_input(plan_file: Path, tmp_path: Path) -> None:
    other = factories.plan(model=factories.model("acme/other", num_hidden_layers=5))
    save_record(factories.measured_run(other), tmp_path / "other.json")
    result = run(plan_file, tmp_path / "other.json")
    assert result.exit_code == 2
    assert "acme/other" in result.stderr


def test_a_terminal_that_knows_only_ascii_gets_no_traceback(plan_file: Path, tmp_path: Path) -> None:
    plan = factories.plan(model=factories.model("modèle/小"))
    save_record(plan, plan_file)
    save_record(factories.measured_run(plan), tmp_path / "measured.json")
    script = "from badam_cli.report import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, str(plan_file), str(tmp_path / "measured.json")],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"mod?le/?" in done.stdout
    assert b"PPPP" in done.stdout


def test_html_is_written_beside_the_tables_with_the_curve_of_the_run(
    plan_file: Path, measured_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather, "rehearse_step", lambda _plan: step_timeline())
    (tmp_path / gather.METRICS_FILE).write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "loss": 4.0}\n')
    result = run(plan_file, measured_file, "--html", tmp_path / "report.html")
    assert result.exit_code == 0
    assert "WITHIN tolerance" in result.stdout
    assert "report written to" in result.stderr
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'id="plot-timeline"' in text
    assert 'id="plot-loss"' in text


def test_a_step_that_cannot_be_rehearsed_costs_only_its_chart(
    plan_file: Path, measured_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_plan: Plan) -> None:
        raise InputError("this model cannot be rehearsed")

    monkeypatch.setattr(gather, "rehearse_step", refuse)
    result = run(plan_file, measured_file, "--html", tmp_path / "report.html")
    assert result.exit_code == 0
    assert "this model cannot be rehearsed" in result.stderr
    assert 'id="plot-timeline"' not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_html_of_several_runs(plan_file: Path, measured_file: Path, tmp_path: Path) -> None:
    result = run(plan_file, measured_file, measured_file, "--html", tmp_path / "report.html")
    assert result.exit_code == 0
    assert "Accuracy of 2 runs" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_html_that_cannot_be_written_is_bad_input(plan_file: Path, measured_file: Path, tmp_path: Path) -> None:
    result = run(plan_file, measured_file, measured_file, "--html", tmp_path / "absent" / "report.html")
    assert result.exit_code == 2
    assert "Cannot write" in result.stderr


def test_calibration_is_kept_for_the_device_of_the_runs(
    plan_file: Path, measured_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BADAM_DATA_DIR", str(tmp_path / "data"))
    result = run(plan_file, measured_file, "--calibrate", "--json")
    assert result.exit_code == 0
    json.loads(result.stdout)
    assert "Calibrated by 1 run on NVIDIA GeForce RTX 3090: context 1.00 GiB" in result.stderr
    assert (tmp_path / "data" / "calibration" / "rtx3090.json").is_file()


def test_a_run_of_another_plan_file_does_not_calibrate(plan_file: Path, tmp_path: Path) -> None:
    save_record(factories.measured_run(factories.plan(method="badam-ratio")), tmp_path / "measured.json")
    result = run(plan_file, tmp_path / "measured.json", "--calibrate")
    assert result.exit_code == 2
    assert "is not the one that the run was started with" in result.stderr


def test_the_command_loads_no_torch(plan_file: Path, measured_file: Path) -> None:
    script = (
        "import sys; from badam_cli.report import app\n"
        f"app([{str(plan_file)!r}, {str(measured_file)!r}], standalone_mode=False)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["--json"], []])
def test_a_full_disk_behind_the_standard_output_is_a_sentence(
    plan_file: Path, measured_file: Path, arguments: list[str]
) -> None:
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "badam_cli.report", plan_file, measured_file, *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: The standard output could not be written: No space left on device.")
    assert "Traceback" not in ended.stderr

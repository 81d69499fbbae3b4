"""The command that measures a table of cases, on the CPU with a tiny model: the code path that a card's run takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from badam.plan import record_digest
from badam_planner.accuracy.compare import compare
from benchmarks.gpu import measure
from benchmarks.gpu.record import CaseRecord, load_case, record_path
from tests.benchmarks.tiny import case, write_model

TOO_LARGE = {"batch_size": 2**22, "seq_len": 2**20}  # 32 TiB of token numbers


def write_cases(directory: Path, cases: list[dict[str, Any]]) -> str:
    path = directory / "cases.json"
    path.write_text(json.dumps(cases))
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, three cases of it (one too large, one of a model that is not there) and no record."""
    directory = tmp_path_factory.mktemp("gpu")
    model = write_model(directory)
    cases = [
        case(model),
        case(model, **TOO_LARGE),
        case(str(directory / "missing.json")),
    ]
    write_cases(directory, [each.model_dump() for each in cases])
    return directory


def run(directory: Path, *arguments: str) -> int:
    records, cases = str(directory / "records"), str(directory / "cases.json")
    return measure.main(["--out", records, "--cases", cases, "--device", "cpu", "--minutes", "3", *arguments])


def record_of(directory: Path, name: str) -> CaseRecord:
    return load_case(record_path(directory / "records", name))


NAMES = ("tiny.layer.all.full.2x16", "tiny.layer.all.full.4194304x1048576", "missing.layer.all.full.2x16")


def test_the_whole_way_from_a_table_of_cases_to_records_and_on_where_it_stopped(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(world) == 1  # one case failed
    good, large, missing = (record_of(world, name) for name in NAMES)

    assert good.outcome == "measured"
    assert good.plan is not None
    assert good.run is not None
    assert good.run.plan_digest == record_digest(good.plan)
    assert good.plan.target.gpu == "cpu"
    assert "benchmarks.gpu.measure --out" in good.run.provenance.command
    assert {block.name for block in good.run.measurement.blocks} == {f"model.layers.{layer}" for layer in (0, 2, 3)}
    assert all(block.steps == 2 for block in good.run.measurement.blocks)
    assert compare(good.plan, good.run, tolerance=0.001).verdict.passed

    assert (large.outcome, large.is_final) == ("out of memory", True)
    assert "32768.00 GiB more were asked for; the plan had predicted" in large.message
    assert large.plan is not None
    assert large.plan.prediction is not None
    assert large.plan.prediction.peak_device_bytes > large.plan.target.usable_bytes

    assert (missing.outcome, missing.is_final) == ("failed", False)
    assert "missing.json: No such file" in missing.message
    capsys.readouterr()

    # The second call tries only what failed; a damaged record is no record.
    record_path(world / "records", NAMES[0]).write_text('{"schema_version": 1')
    before = record_path(world / "records", NAMES[1]).stat().st_mtime_ns
    assert run(world) == 1
    said = capsys.readouterr().out
    assert "3 cases, 1 of them measured already" in said
    assert record_of(world, NAMES[0]).outcome == "measured"
    assert record_path(world / "records", NAMES[1]).stat().st_mtime_ns == before
    assert said.index(NAMES[0]) < said.index(NAMES[2])  # what failed before comes last
    assert [path.name for path in (world / "records").glob(".*")] == []  # no logs, no temporary files


def test_cases_of_badam_1_4_are_skipped_in_a_sentence_where_it_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cases(tmp_path, [case(write_model(tmp_path), side="badam-1.4").model_dump()])
    assert run(tmp_path) == 0
    assert "skipped: 1 cases with badam 1.4's optimizer" in capsys.readouterr().out
    assert run(tmp_path, "--old-badam", str(tmp_path)) == 2
    assert "does not hold badam 1.4" in capsys.readouterr().out


def test_a_pattern_that_matches_nothing_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cases(tmp_path, [case(write_model(tmp_path)).model_dump()])
    assert run(tmp_path, "--only", "nothing") == 2
    assert "No case matches 'nothing'" in capsys.readouterr().out


def test_cases_that_are_no_cases_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cases(tmp_path, [{"model": "x", "batch_size": 0, "seq_len": 1}])
    assert run(tmp_path) == 2
    assert "batch_size" in capsys.readouterr().out


def test_listing_the_table_measures_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure.main(["--out", str(tmp_path / "none"), "--list", "--only", "*7b*attn*"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "llama-2-7b-hf.attn-mlp.all.full.8x728",
        "qwen2-5-7b.attn-mlp.all.full.4x1024",
    ]
    assert not (tmp_path / "none").exists()


ALONE = """
import importlib.machinery, json, sys
from pathlib import Path

absent = {"bitsandbytes", "datasets", "deepspeed", "galore_torch", "lomo_optim", "plotly", "pytorch_optimizer", "trl"}
found = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = staticmethod(
    lambda name, *rest: None if name.partition(".")[0] in absent else found(name, *rest)
)
import torch

from benchmarks.gpu.cases import Case
from benchmarks.gpu.worker import PRELOAD, Job, run_case

for module in PRELOAD:
    __import__(module)
torch.set_num_threads(1)
told = {}
for settings in json.loads(sys.argv[2]):
    case = Case(model=sys.argv[1], batch_size=2, seq_len=16, block_epochs=1, **settings)
    record = run_case(case, Job(case, "cpu", Path("."), "test"), lambda: None)
    told[case.way] = [record.outcome, record.message]
print(json.dumps(told))
"""


def test_a_machine_with_torch_and_transformers_alone_measures_all_but_what_it_says_it_lacks(tmp_path: Path) -> None:
    settings = [{}, {"method": "badam-ratio"}, {"method": "adam"}, {"method": "lomo"}]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, write_model(tmp_path), json.dumps(settings)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    lomo = told.pop("lomo")
    assert told == {way: ["measured", ""] for way in ("layer", "badam-ratio", "adam")}
    assert lomo[0] == "failed"
    assert "needs lomo-optim" in lomo[1]

from __future__ import annotations

import json
from pathlib import Path

from badam.plan import Target, Training
from badam.units import GIB, MIB
from badam.vocabulary import Category, Phase
from badam_planner.rehearsal.evaluator import Evaluator
from badam_planner.rehearsal.model_tree import inspect_model
from badam_planner.report.html.gather import METRICS_FILE, read_curve, rehearse_step, sizes_that_fit
from badam_planner.search.settings import MemorySetting
from badam_planner.search.size_map import resized
from tests.badam_planner import factories


def write_log(directory: Path, *lines: str) -> Path:
    (directory / METRICS_FILE).write_text("\n".join(lines), encoding="utf-8")
    return directory / "measured.json"


def line(step: int, loss: float, **more: object) -> str:
    return json.dumps({"step": step, "loss": loss, "block": "layer 0", "peak_bytes": 7, **more})


def test_curve_has_one_point_per_step_in_order(tmp_path: Path) -> None:
    curve = read_curve(write_log(tmp_path, line(2, 4.0), line(1, 5.0)))
    assert curve is not None
    assert [(point.step, point.loss, point.block) for point in curve.points] == [
        (1, 5.0, "layer 0"),
        (2, 4.0, "layer 0"),
    ]


def test_a_resumed_step_counts_once_with_its_later_loss(tmp_path: Path) -> None:
    curve = read_curve(write_log(tmp_path, line(1, 5.0), line(2, 4.0), line(2, 3.5)))
    assert curve is not None
    assert [point.loss for point in curve.points] == [5.0, 3.5]


def test_torn_and_foreign_lines_are_left_out(tmp_path: Path) -> None:
    curve = read_curve(write_log(tmp_path, line(1, 5.0), "[1]", '{"loss": 3}', line(2, 4.0)[:-9]))
    assert curve is not None
    assert [point.step for point in curve.points] == [1]


def test_no_log_and_an_empty_log_give_no_curve(tmp_path: Path) -> None:
    assert read_curve(tmp_path / "measured.json") is None
    assert read_curve(write_log(tmp_path, "", "nothing")) is None


def test_a_rehearsed_step_peaks_where_its_plan_says_and_starts_with_the_forward() -> None:
    spec = factories.model(
        hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=4, vocab_size=256
    )
    target = Target(gpu="cpu", total_bytes=8 * GIB, usable_bytes=8 * GIB, context_bytes=GIB, workspace_bytes=MIB)
    plan = factories.plan(
        model=spec, target=target, training=Training(batch_size=2, seq_len=32), prediction={"peak_block": "layer 1"}
    )
    step = rehearse_step(plan)
    assert step.samples[0].phase is Phase.FORWARD
    assert [span.phase for span in step.spans][:4] == [Phase.FORWARD, Phase.LOSS, Phase.BACKWARD, Phase.STEP]
    assert "layer 1" in step.title
    assert step.limit_bytes == 7 * GIB - MIB
    assert max(sample.total_bytes for sample in step.samples) > step.samples[0].by_category[Category.PARAMETER] > 0


def test_the_timeline_and_the_sizes_of_several_gpus_are_those_of_one_of_them() -> None:
    spec = factories.model(
        hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=4, vocab_size=256
    )
    several = Target(gpu="cpu", total_bytes=8 * GIB, usable_bytes=8 * GIB, engine="fsdp2", num_gpus=4)
    plan = factories.plan(model=spec, target=several, training=Training(batch_size=1, seq_len=256))
    evaluator = Evaluator(inspect_model(plan.model, plan.training.attention))
    drawn = max(sample.total_bytes for sample in rehearse_step(plan).samples)
    assert drawn == evaluator.peaks(plan, 0).peak_allocated_bytes
    cell = next(cell for cell in sizes_that_fit(plan).cells if (cell.batch_size, cell.seq_len) == (1, 256))
    fastest = MemorySetting("none", "full")
    needed = evaluator.worst_block(resized(plan, 1, 256, fastest, evaluator.tree)).worst.peak_device_bytes
    assert cell.peak_device_bytes == needed
    alone = plan.model_copy(update={"target": several.model_copy(update={"engine": "single", "num_gpus": 1})})
    assert needed != evaluator.worst_block(resized(alone, 1, 256, fastest, evaluator.tree)).worst.peak_device_bytes

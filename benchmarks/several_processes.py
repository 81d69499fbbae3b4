"""badam-train in several processes against one: losses, weights, a resumed run, and the predicted peak.

    python -m benchmarks.several_processes        # a table to stdout, figures to benchmarks/results/

The commands are those of a user, on the CPU: badam-plan, badam-train under torchrun, badam-report. Every run has the
same weights, data and global batch of eight sequences in two micro-batches.

* In fp32, three block epochs with K = 3: the largest relative difference of a step's loss, and the largest absolute
  difference of a weight, from the run of one process.
* In bf16, one visit to each block: the largest error of the predicted peak, over all blocks.
* In fp32, resumed in the middle of a visit from the checkpoint of four processes: the same differences.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file

MODEL = "badam/demo-llama-12m"
GLOBAL_BATCH, ACCUMULATE, BLOCKS, EVERY = 8, 2, 8, 3
STEPS = 3 * BLOCKS * EVERY
SAVED_AT = STEPS // 2 + 1  # one step into a visit
RESULT = Path(__file__).parent / "results" / "several_processes.json"


@dataclass(frozen=True)
class Layout:
    """How processes share the model."""

    name: str
    processes: int
    options: tuple[str, ...]  # of badam-plan


FSDP2, COPIES, ZERO3 = ("--engine", "fsdp2"), ("--engine", "ddp"), ("--engine", "zero3")
ALONE = Layout("one process", 1, ())
LAYOUTS = (  # those of four processes first, whose checkpoints those of two go on from
    Layout("FSDP2", 4, FSDP2),
    Layout("FSDP2", 2, FSDP2),
    Layout("FSDP2, two copies (HSDP)", 4, (*FSDP2, "--shard-size", "2")),
    Layout("whole copies", 4, COPIES),
    Layout("whole copies", 2, COPIES),
    Layout("ZeRO-3", 4, ZERO3),
    Layout("ZeRO-3", 2, ZERO3),
    Layout("ZeRO-3, all offloaded", 2, (*ZERO3, "--offload", "all")),
)


@dataclass(frozen=True)
class Row:
    """What one layout showed."""

    layout: str
    processes: int
    loss_difference: float
    weight_difference: float
    resumed_loss_difference: float | None
    resumed_weight_difference: float | None
    peak_error: float


def run(*command: str, processes: int = 1) -> str:
    """A command of this project, by torchrun if for several processes; what it printed."""
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m")
    module = ["-m", *(launcher if processes > 1 else ()), *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, *module], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(module)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def planned(layout: Layout, path: Path, *, dtype: str, every: int) -> Path:
    """A plan with the same global batch for any number of processes."""
    batch = GLOBAL_BATCH // ACCUMULATE // layout.processes
    run(
        "badam_cli.plan", MODEL, "--gpu", "cpu", "--num-gpus", str(layout.processes), *layout.options,
        "--dtype", dtype, "--batch-size", str(batch), "--grad-accum", str(ACCUMULATE), "--seq-len", "64",
        "--partition", "layer", "--switch-every", str(every), "--learning-rate", "1e-3", "--output", str(path),
    )  # fmt: skip
    return path


def trained(plan: Path, directory: Path, processes: int, *options: str) -> Path:
    """The directory of a run of ``plan``."""
    common = ("--pad-to", "plan", "--lr-scheduler", "constant", "--init", "random")
    run("badam_cli.train", "--plan", str(plan), "--output-dir", str(directory), *common, *options, processes=processes)
    return directory


def differences(directory: Path, alone: Path, *, since: int = 0) -> tuple[float, float]:
    """Of two runs, the largest relative difference of a loss and the largest absolute one of a weight."""
    losses, expected = (
        [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (directory, alone)
    )
    pairs = list(zip(losses, expected[since:], strict=True))
    weights, others = (load_file(path / "model" / "model.safetensors") for path in (directory, alone))
    largest = max(float((weights[name] - others[name]).abs().max()) for name in others)
    return max(abs(loss / other - 1) for loss, other in pairs), largest


def peak_error(plan: Path, directory: Path) -> float:
    """The relative error of the predicted peak of the block where it is largest."""
    command = [sys.executable, "-m", "badam_cli.report", str(plan), str(directory / "measured.json"), "--json"]
    text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    error: float = json.loads(text)["verdict"]["error_fraction"]
    return error


def measure(work: Path) -> Iterator[Row]:
    """All layouts, one after the other."""
    steps = ("--max-steps", str(STEPS))
    alone = trained(planned(ALONE, work / "alone.json", dtype="float32", every=EVERY), work / "alone", 1, *steps)
    for layout in LAYOUTS:
        print(f"{layout.name}, {layout.processes} processes", file=sys.stderr, flush=True)
        here = work / f"{layout.name} {layout.processes}"
        here.mkdir()
        plan = planned(layout, here / "wide.json", dtype="float32", every=EVERY)
        whole = trained(plan, here / "wide", layout.processes, *steps, "--save-steps", str(SAVED_AT))
        narrow = planned(layout, here / "narrow.json", dtype="bfloat16", every=2)
        visited = trained(narrow, here / "narrow", layout.processes, "--max-steps", str(2 * BLOCKS))
        found, error = differences(whole, alone), peak_error(narrow, visited)
        yield Row(layout.name, layout.processes, *found, *resumed(layout, work, alone), error)


def resumed(layout: Layout, work: Path, alone: Path) -> tuple[float | None, float | None]:
    """The differences of a run that goes on from the checkpoint of more processes, where there is one."""
    source = work / f"{layout.name} 4"
    if layout.processes == 4 or not source.is_dir():
        return None, None
    target = source / "resumed"
    shutil.copytree(source / "wide" / f"checkpoint-{SAVED_AT}", target / f"checkpoint-{SAVED_AT}")
    trained(source / "wide.json", target, layout.processes, "--max-steps", str(STEPS), "--resume")
    return differences(target, alone, since=SAVED_AT)


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| layout | processes | losses | weights | saved on 4, resumed: losses | weights | predicted peak |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        differences_of_row = (
            row.loss_difference,
            row.weight_difference,
            row.resumed_loss_difference,
            row.resumed_weight_difference,
        )
        figures = " | ".join("" if each is None else f"{each:.1e}" for each in differences_of_row)
        lines.append(f"| {row.layout} | {row.processes} | {figures} | {row.peak_error:+.2%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        every = list(measure(Path(directory)))
    record = {"command": "python -m benchmarks.several_processes", "rows": [asdict(row) for row in every]}
    RESULT.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(table(every))

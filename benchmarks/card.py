"""Run the table, the draws and the traces on the null CUDA device, as if on several GPUs; no GPU is needed.

    make card                                          # once: the environment with torch's CUDA build
    python -m benchmarks.card                          # everything: some ten minutes for each GPU and part on two cores
    python -m benchmarks.card --gpus h200 --parts table --only llama-3-2-1b --minutes 5

Each part goes on where an earlier call stopped: a valid record is not made again. The records are kept apart from those
of real GPUs, in benchmarks/records/null_device, and the name of their device ends in "(null device)". The table is that
of benchmarks.gpu.measure, the draws are those of benchmarks.gpu.budget, and the traces ask whether the simulated
allocator is exact on the requests of real runs (benchmarks.null_cuda.trace). Loads no torch.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from badam.errors import BadamError, InputError
from benchmarks.null_cuda.records import TRACES, load_trace

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / ".venv-card"
RECORDS = ROOT / "benchmarks" / "records" / "null_device"
GPUS = ("rtx3090", "a100-80gb", "h200")
DRAWN_ON = ("rtx3090", "a100-80gb")
ROOM_GIB = 200
"""Memory of the device for draws: each has a limit of its own, which torch's allocator keeps, whatever the GPU has."""
PARTS = ("table", "draws", "traces")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if all of it ran and nothing was wrong, 1 if something was or is left, 2 for bad input."""
    options = _parser().parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    try:
        python = interpreter()
        codes = [0]
        for part in options.parts:
            if part == "traces":
                codes.append(_traces(python, options, deadline))
                continue
            gpus = [gpu for gpu in options.gpus if part == "table" or gpu in DRAWN_ON]
            codes.extend(_measured(python, part, gpu, options, deadline) for gpu in gpus)
        return max(codes)
    except BadamError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def interpreter() -> Path:
    """The Python with torch's CUDA build.

    Raises:
        InputError: if it is not there.
    """
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        raise InputError("The environment with torch's CUDA build is not here.", advice="Make it with: make card.")
    return python


def _measured(python: Path, part: str, gpu: str, options: argparse.Namespace, deadline: float) -> int:
    """One part of benchmarks.gpu on one GPU."""
    minutes = (deadline - time.monotonic()) / 60
    if minutes <= 0:
        print(f"{part} on {gpu}: no time left")
        return 1
    print(f"{part} on {gpu}", flush=True)
    device = ["--gpu", gpu]
    if part == "table":
        command = ["benchmarks.gpu.measure", "--out", str(options.out / gpu), "--minutes", f"{minutes:.2f}"]
        command += [f"--only={pattern}" for pattern in options.only]
        command += [] if options.old_badam is None else ["--old-badam", str(options.old_badam.resolve())]
    else:
        device += ["--total-gib", str(ROOM_GIB)]
        command = ["benchmarks.gpu.budget", "--out", str(options.out / gpu / "budget"), "--cases", str(options.draws)]
        command += ["--minutes", f"{minutes:.2f}"]
    return _run([python, "-m", "benchmarks.null_cuda", *device, "--", python, "-m", *command])


def _traces(python: Path, options: argparse.Namespace, deadline: float) -> int:
    """Every trace that has no record, and what became of all of them."""
    wanted = [trace for trace in TRACES if trace.gpu in options.gpus]
    found = {}
    for trace in wanted:
        path = options.out / "traces" / f"{trace.name}.json"
        if not _is_trace(path) and time.monotonic() < deadline:
            path.parent.mkdir(parents=True, exist_ok=True)
            kind = ["--expandable-segments"] if trace.expandable_segments else []
            command = ["benchmarks.null_cuda.trace", trace.case, "--gpu", trace.gpu, *kind, "--record", str(path)]
            _run([python, "-m", *command], quiet=True)
        if _is_trace(path):
            found[trace] = record = load_trace(path)
            off = record.simulated_reserved_bytes - record.reserved_bytes
            verdict = "exact" if record.is_exact else f"{off:+,} B reserved"
            print(f"{trace.name}: {record.events:,} events, {verdict}", flush=True)
    exact = sum(record.is_exact for record in found.values())
    print(f"simulated allocator on the requests of real runs: exact in {exact} of {len(found)}, {len(wanted)} wanted")
    return int(exact < len(wanted))


def _is_trace(path: Path) -> bool:
    try:
        load_trace(path)
    except BadamError:
        return False
    return True


def _run(command: Sequence[str | Path], *, quiet: bool = False) -> int:
    """Run a command in the repository, its output shown or, if it is quiet, shown only where it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=quiet, text=True, check=False)
    if quiet and done.returncode:
        print("\n".join((done.stdout + done.stderr).splitlines()[-12:]), flush=True)
    return done.returncode


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.card", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", nargs="+", default=GPUS, metavar="GPU", help="names of the catalogue")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="of the table: names of cases")
    parser.add_argument("--draws", type=int, default=200, help="on each of two GPUs")
    parser.add_argument("--minutes", type=float, default=240, help="of everything together")
    parser.add_argument("--out", type=Path, default=RECORDS, help="directory of the records")
    parser.add_argument("--old-badam", type=Path, metavar="DIR", help="where badam 1.4's wheel is unpacked")
    return parser


if __name__ == "__main__":
    sys.exit(main())

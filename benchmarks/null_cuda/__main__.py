"""Run a command on a CUDA device that computes nothing, under PyTorch's real CUDA build.

    .venv-card/bin/python -m benchmarks.null_cuda --gpu rtx3090 -- badam-plan meta-llama/Llama-2-7b-hf --gpu auto
    .venv-card/bin/python -m benchmarks.null_cuda --gpu a100-80gb -- python train.py

What torch reports of memory is what it would report on the GPU that is named. README.md beside this file says what
that shows and what it cannot. Loads no torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from badam.errors import BadamError, InputError
from badam.units import GIB
from benchmarks.null_cuda.device import FLASH_SINCE, environment
from benchmarks.null_cuda.gpus import find_gpu


def main(arguments: Sequence[str] | None = None) -> int:
    """Become the command; returns 2 if that is not possible."""
    parser = argparse.ArgumentParser(prog="benchmarks.null_cuda", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--gpu", default=os.environ.get("NULL_CUDA_GPU", "rtx3090"), help="a name of the catalogue, such as a100-80gb"
    )
    parser.add_argument("--count", type=int, default=1, help="how many of them there are")
    parser.add_argument("--total-gib", type=float, help="of memory, in the place of what the GPU has")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run, after --")
    options = parser.parse_args(arguments)
    try:
        return _become(options)
    except BadamError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _become(options: argparse.Namespace) -> int:
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise InputError("Nothing to run.", advice="Name a command after --, such as: -- python train.py.")
    gpu = find_gpu(options.gpu)
    total = None if options.total_gib is None else round(options.total_gib * GIB)
    variables = environment(gpu, total_bytes=total, count=options.count)
    if "TORCH_CUDNN_SDPA_DEPRIORITIZED" in variables and "TORCH_CUDNN_SDPA_DEPRIORITIZED" not in os.environ:
        print(
            f"null device: from compute capability {'.'.join(map(str, FLASH_SINCE))} on torch prefers cuDNN's "
            "attention, which is not served here; flash attention runs in its place",
            file=sys.stderr,
        )
    # The commands of this environment come first, so that `python` and `badam-plan` are the ones with the CUDA build.
    variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), variables.get("PATH", os.defpath)])
    try:
        os.execvpe(command[0], command, variables)
    except OSError as error:
        raise InputError(f"Cannot run {command[0]}: {error.strerror or error}.") from error


if __name__ == "__main__":
    sys.exit(main())

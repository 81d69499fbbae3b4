"""Set one case's real requests to torch's allocator beside the predicted ones, request by request.

    .venv-card/bin/python -m benchmarks.null_cuda.trace llama-2-7b-hf.layer.all.full.8x728 --gpu a100-80gb
    .venv-card/bin/python -m benchmarks.null_cuda.trace plan.json --expandable-segments --json trace.json

CASE is a name of benchmarks.gpu.cases, a JSON object that is a case, or a plan that badam-plan wrote. The case trains
on the null device; every request is recorded with its phase and the operator that made it. Then: is the simulated
allocator exact on these requests? what is alive at the measured peak and not at the predicted one, and the other way
round? which events of a step come in another order, and which are predicted not at all?
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from badam.errors import BadamError, InputError
from badam.units import MIB
from benchmarks.gpu.cases import CASES, Case
from benchmarks.null_cuda.device import environment, is_null_device
from benchmarks.null_cuda.gpus import find_gpu

if TYPE_CHECKING:
    from badam.plan import Plan
    from badam.profiling.record import MeasuredRun
    from badam_planner.rehearsal.model_tree import ModelTree
    from benchmarks.null_cuda.history import Simulation

EXPANDABLE = "expandable_segments:True"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if the simulated allocator is exact on the real requests, 1 if not, 2 for bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    try:
        if not is_null_device():
            _start_again(options, arguments)
        return _trace(options)
    except BadamError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _start_again(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    variables = environment(find_gpu(options.gpu))
    variables["TORCH_SYMBOLIZE_MODE"] = "dladdr"  # names of operators in some seconds, not minutes
    variables.setdefault("TRANSFORMERS_VERBOSITY", "error")
    target = _load(options).target if options.case.endswith(".json") else None
    if options.expandable_segments or (target is not None and target.expandable_segments):
        arguments = [*arguments, "--expandable-segments"]
        variables["PYTORCH_CUDA_ALLOC_CONF"] = EXPANDABLE
    if target is not None and target.engine == "zero3":
        variables["NULL_CUDA_TRUTH"] = "0"  # DeepSpeed reads one byte to learn whether a gradient overflowed
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks.null_cuda.trace", *arguments], variables)


def _trace(options: argparse.Namespace) -> int:
    import warnings

    import torch

    from benchmarks.gpu.plans import predicted
    from benchmarks.null_cuda import compare
    from benchmarks.null_cuda.history import simulate
    from benchmarks.null_cuda.product import predicted_requests
    from benchmarks.null_cuda.training import train

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    plan, tree, steps = _plan(options)
    if options.expandable_segments:
        plan = plan.model_copy(update={"target": plan.target.model_copy(update={"expandable_segments": True})})
    plan = predicted(plan, tree)
    assert plan.prediction is not None
    run, requests = train(
        plan, steps, command=shlex.join(["python", "-m", "benchmarks.null_cuda.trace", *sys.argv[1:]])
    )
    measured, prediction = run.measurement, plan.prediction
    assert measured.peak_reserved_bytes is not None
    say = print
    gpu, blocks = torch.cuda.get_device_name(), len(plan.partition.blocks)
    say(f"{gpu}; {steps} steps over {blocks} blocks; {len(requests)} events")
    for name, real, ours in (
        ("allocated", measured.peak_allocated_bytes, prediction.peak_allocated_bytes),
        ("reserved", measured.peak_reserved_bytes, prediction.peak_reserved_bytes),
    ):
        say(f"{name}: measured {real:,}, predicted {ours:,}, {ours - real:+,} ({(ours - real) / real:+.3%})")
    say(f"measured peak: {measured.peak_phase} of {measured.peak_block}")
    say(f"predicted peak: {prediction.peak_phase} of {prediction.peak_block}")
    by_phase = {phase: prediction.by_phase.get(phase, 0) - nbytes for phase, nbytes in measured.by_phase.items()}
    say("allocated by phase, predicted less measured: " + ", ".join(f"{p} {n:+,}" for p, n in by_phase.items()))

    simulation = simulate(requests, expandable_segments=options.expandable_segments)
    off = (
        simulation.peak_allocated - measured.peak_allocated_bytes,
        simulation.peak_reserved - measured.peak_reserved_bytes,
    )
    say(f"simulated allocator on the real requests: allocated {off[0]:+,} B, reserved {off[1]:+,} B")

    names = [block.name for block in plan.partition.blocks]
    block = names.index(measured.peak_block) if measured.peak_block in names else 0
    ours = predicted_requests(plan, tree, block)
    say(f"\nAt the peak of {names[block]}, measured less predicted:")
    say(*compare.differences_at_peak(simulation, ours, options.top), sep="\n")
    say("\nRequests of sizes that the prediction has none of:")
    say(*compare.unpredicted_sizes(requests, ours, MIB // 4, options.top), sep="\n")
    of_block = sorted({request.step for request in requests if request.block == names[block] and request.step >= 0})
    step = of_block[-1] if options.step is None else options.step
    say(f"\nOrder of events in step {step} (steps of this block: {', '.join(map(str, of_block))}):")
    say(*compare.differences_in_order(
        compare.measured_step(requests, step), compare.predicted_step(ours.events), options.least, options.top
    ), sep="\n")  # fmt: skip
    if options.json is not None:
        _write(options.json, requests, ours, run)
    if options.record is not None:
        _save(options, run, len(requests), simulation)
    return int(off != (0, 0))


def _plan(options: argparse.Namespace) -> tuple[Plan, ModelTree, int]:
    """The plan without prediction, its model's tree, and the optimizer steps to run."""
    from badam_planner.rehearsal.model_tree import inspect_model
    from benchmarks.gpu.plans import case_plan
    from benchmarks.gpu.worker import target_of

    if options.case.endswith(".json"):
        plan = _load(options)
        schedule = plan.schedule.model_copy(update={"switch_every": options.switch_every})
        plan = plan.model_copy(update={"prediction": None, "schedule": schedule})
        blocks = len(plan.partition.blocks)
        visits = blocks if options.visits is None else options.visits
        return plan, inspect_model(plan.model, plan.training.attention), visits * plan.schedule.switch_every
    case = _case(options.case)
    plan, tree, _ = case_plan(case, target_of("cuda"), "trace")
    steps = case.steps(len(plan.partition.blocks))
    return plan, tree, steps if options.visits is None else options.visits * case.switch_every


def _load(options: argparse.Namespace) -> Plan:
    from badam.plan import load_plan

    return load_plan(Path(options.case))


def _case(text: str) -> Case:
    if text.startswith("{"):
        return Case.model_validate_json(text)
    for case in CASES:
        if case.name == text:
            return case
    raise InputError(f"No case is called {text!r}.", advice="See their names with benchmarks.gpu.measure --list.")


def _write(path: Path, requests: Sequence[Any], ours: Any, run: Any) -> None:
    record = {
        "measured": run.measurement.model_dump(mode="json"),
        "requests": [
            [one.action, one.number, one.nbytes, one.stream, one.step, one.block, one.phase, one.operator]
            for one in requests
        ],
        "predicted": [[event.nbytes, event.phase, event.what] for event in ours.events],
    }
    path.write_text(json.dumps(record), encoding="utf-8")


def _save(options: argparse.Namespace, run: MeasuredRun, events: int, simulation: Simulation) -> None:
    from badam.plan import save_record
    from benchmarks.null_cuda.records import Trace, TraceRecord

    assert run.measurement.peak_reserved_bytes is not None
    record = TraceRecord(
        trace=Trace(
            case=options.case, gpu=os.environ["NULL_CUDA_GPU"], expandable_segments=options.expandable_segments
        ),
        events=events,
        allocated_bytes=run.measurement.peak_allocated_bytes,
        reserved_bytes=run.measurement.peak_reserved_bytes,
        simulated_allocated_bytes=simulation.peak_allocated,
        simulated_reserved_bytes=simulation.peak_reserved,
        machine=run.machine,
        provenance=run.provenance,
    )
    save_record(record, options.record)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.null_cuda.trace", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("case", metavar="CASE")
    parser.add_argument("--gpu", default="a100-80gb", help="a name of the catalogue, such as rtx3090")
    parser.add_argument("--expandable-segments", action="store_true")
    parser.add_argument("--visits", type=int, help="how many blocks are visited, instead of what the case says")
    parser.add_argument("--switch-every", type=int, default=2, help="steps of a visit to a block of a plan.json")
    parser.add_argument("--step", type=int, help="whose order is compared, instead of the peak block's last")
    parser.add_argument("--least", type=int, default=MIB, help="bytes of the events whose order is compared")
    parser.add_argument("--top", type=int, default=20, help="lines of each list")
    parser.add_argument("--json", type=Path, help="write all requests and all predicted events there")
    parser.add_argument("--record", type=Path, help="write there how exact the simulated allocator is")
    return parser


if __name__ == "__main__":
    sys.exit(main())

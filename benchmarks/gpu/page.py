"""The documentation's page about GPUs, from records. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from badam.plan import Provenance, Target
from badam.units import format_bytes, format_gib, format_seconds
from badam.vocabulary import Phase
from badam_planner.accuracy.comparison import Pair
from badam_planner.recording.caching_allocator import CachingAllocator
from badam_planner.report.text import bytes_or_nothing, error_percent, percent, signed_percent
from benchmarks.gpu.draws import BudgetRecord, Outcome, summary
from benchmarks.gpu.figures import Rivals, Row, Spread, rivals, rows, seconds, spreads
from benchmarks.gpu.record import Assumptions, CaseRecord, Scratch

HEAD = """# Accuracy on GPUs

Written by `python -m benchmarks.gpu.table` from the records in `benchmarks/records/gpu`; `benchmarks/gpu/README.md`
says how to make more. The error is predicted less measured, as a share of the measured bytes: with a minus the
prediction was too low. The CPU has a page of its own, [accuracy-cpu.md](accuracy-cpu.md).
"""

NULL_HEAD = """# Accuracy on the null device

Written by `python -m benchmarks.gpu.table --null-device` from the records in `benchmarks/records/null_device`, which
`python -m benchmarks.card` makes. torch's CUDA build and its caching allocator are real, the device computes nothing
(`benchmarks/null_cuda/README.md`): allocated and reserved bytes are what torch's host code asks of a GPU of that name.
The context, time and what closed libraries take for themselves cannot be seen there, and are not shown; no GPU has
confirmed these figures yet. The error is predicted less measured, as a share of the measured bytes: with a minus the
prediction was too low.
"""

NULL_DEVICE = "(null device)"
"""Ends the name of a device that computes nothing."""

NONE_YET = """
No record has been made on a CUDA device yet, so nothing is claimed here about how close a prediction comes on one. What
a card takes beyond what a run on a CPU can show (context, workspaces, scratch inside kernels, the caching allocator) is
predicted from its documented rules and not yet measured.
"""


@dataclass(frozen=True, slots=True)
class Machines:
    """All records of one kind of card."""

    name: str
    cases: list[CaseRecord]
    assumptions: list[Assumptions]
    budgets: list[BudgetRecord]


def page(found: Sequence[Machines], *, null_device: bool = False) -> str:
    """The whole page; records of real GPUs and of the null device never stand on one.

    Raises:
        ValueError: if a record is of the other kind.
    """
    for machine in found:
        if machine.name.endswith(NULL_DEVICE) != null_device:
            raise ValueError(f"Records of {machine.name} do not belong on this page.")
    head = NULL_HEAD if null_device else HEAD
    return head + "".join([section(machine) for machine in found] or [NONE_YET])


def section(machine: Machines) -> str:
    """Everything about one kind of card."""
    compared = rows(machine.cases)
    is_null = machine.name.endswith(NULL_DEVICE)
    peaks = ("allocated", "reserved") if is_null else ("allocated", "reserved", "device")
    parts = [f"\n## {machine.name}\n\n{_origin(machine)}\n"]
    if compared:
        parts += ["\n### Peak memory\n\n", _accuracy(compared, peaks), "\n", _spread(compared, peaks)]
    if compared and not is_null:
        parts += ["\n### Time of an optimizer step\n\n", _times(compared)]
    parts += _ended(machine.cases)
    if pairs := rivals(machine.cases):
        parts += ["\n### Beside badam 1.4's optimizer\n\n", _beside(pairs)]
    if machine.budgets:
        parts += ["\n### Decisions near a limit\n\n", _decisions(machine.budgets)]
    for assumptions in () if is_null else machine.assumptions:
        parts += [
            "\n### What the predictor assumes of this card\n\n",
            _assumed(assumptions, compared[0].comparison.plan.target if compared else None),
        ]
    return "".join(parts)


def _origin(machine: Machines) -> str:
    records: list[CaseRecord | BudgetRecord | Assumptions] = [*machine.cases, *machine.budgets, *machine.assumptions]
    origins = [record.provenance for record in records]
    dates = sorted(origin.date[:10] for origin in origins)
    versions = sorted({_versions(origin) for origin in origins if origin.versions})
    commands = sorted({origin.command for origin in origins})
    text = (
        f"{machine.name}; {' and '.join(versions)}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}. Commands:\n\n"
    )
    return text + "\n".join(f"    {command}" for command in commands)


def _versions(origin: Provenance) -> str:
    return ", ".join(f"{name} {origin.versions[name]}" for name in ("torch", "transformers") if name in origin.versions)


def _table(heads: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _accuracy(compared: Sequence[Row], peaks: Sequence[str]) -> str:
    heads = ["case (sizes in GiB: predicted / measured)", *(word for name in peaks for word in (name, "error"))]
    body = []
    for row in compared:
        cells = [f"`{row.record.case.name}`"]
        for name in peaks:
            pair = row.total(name)
            cells += [_sizes(pair), error_percent(pair)]
        body.append([*cells, "-" if row.worst_block is None else error_percent(row.worst_block)])
    return _table([*heads, "worst block"], body)


def _sizes(pair: Pair) -> str:
    return " / ".join("-" if size is None else format_gib(size) for size in (pair.predicted, pair.measured))


def _spread(compared: Sequence[Row], peaks: Sequence[str]) -> str:
    body = [
        [
            spread.name,
            str(spread.cases),
            percent(spread.median),
            f"{signed_percent(spread.worst)} (`{spread.worst_case}`)",
        ]
        for spread in spreads(compared)
        if spread.name in peaks
    ]
    later = sum(row.record.repredicted is not None for row in compared)
    note = f"\n{later} of {len(compared)} predictions were made again after the run, by newer code.\n" if later else ""
    return _table(["peak", "cases", "median error", "worst error"], body) + note


def _worst(spread: Spread) -> str:
    return f"{signed_percent(spread.worst)} (`{spread.worst_case}`)"


def _times(compared: Sequence[Row]) -> str:
    body = []
    for row in compared:
        measurement = row.comparison.measurement
        times = [
            seconds(measurement, Phase.FORWARD, Phase.LOSS),
            seconds(measurement, Phase.BACKWARD, Phase.RECOMPUTE),
            seconds(measurement, Phase.STEP),
            seconds(measurement, Phase.SWITCH),
        ]
        cells = ["-" if time is None else format_seconds(time) for time in times]
        body.append([f"`{row.record.case.name}`", *cells, f"{measurement.tokens_per_second:,.0f}"])
    return _table(["case", "forward and loss", "backward", "step", "switch (each)", "tokens/s"], body)


def _ended(cases: Iterable[CaseRecord]) -> list[str]:
    """Cases that ran out of memory, beside what was predicted, and cases that failed."""
    parts = []
    refused = [case for case in cases if case.outcome == "out of memory"]
    if refused:
        body = []
        for case in refused:
            plan = case.latest_plan
            prediction = None if plan is None else plan.prediction
            told = "no prediction"
            if plan is not None and prediction is not None:
                fits = prediction.peak_device_bytes <= plan.target.usable_bytes
                told = f"{format_bytes(prediction.peak_device_bytes)}: {'fits' if fits else 'does not fit'}"
            body.append([f"`{case.case.name}`", told, case.message.split(";")[0]])
        parts += ["\n### Out of memory\n\n", _table(["case", "predicted", "what happened"], body)]
    failed = [case for case in cases if case.outcome == "failed"]
    if failed:
        body = [[f"`{case.case.name}`", (case.message.splitlines() or [""])[-1]] for case in failed]
        parts += ["\n### Not measured\n\n", _table(["case", "why"], body)]
    return parts


def _beside(pairs: Sequence[Rivals]) -> str:
    body = []
    for pair in pairs:
        for name, record in (("this", pair.own), ("1.4", pair.old)):
            assert record.run is not None, "rivals() takes measured cases only"
            measurement = record.run.measurement
            times = (seconds(measurement, Phase.STEP), seconds(measurement, Phase.SWITCH), measurement.step_seconds)
            cells = ["-" if time is None else format_seconds(time) for time in times]
            body.append([f"`{pair.own.case.name}`", name, format_gib(measurement.peak_allocated_bytes), *cells])
    note = (
        "Model, loss and checkpointing are the same on both sides; only the optimizer differs. Adam's step includes "
        "clipping.\n\n"
    )
    return note + _table(["case", "optimizer", "peak GiB", "step", "switch (each)", "whole step"], body)


def _decisions(budgets: Sequence[BudgetRecord]) -> str:
    outcomes: list[Outcome] = [outcome for record in budgets for outcome in record.outcomes]
    text = (
        "Random configurations, each within 5 % of a pretended limit that torch's allocator keeps to. A *wrong fit* "
        "was predicted to fit and ran out of memory, a *false refusal* the other way round. The context takes no "
        "part.\n\n"
    )
    return f"{text}{summary(outcomes, len(outcomes))}.\n"


def _assumed(found: Assumptions, target: Target | None) -> str:
    context = None if target is None else target.context_bytes
    workspace = None if target is None else target.workspace_bytes
    figures: list[tuple[str, int | None, int]] = [
        *((f"context after: {stage}", context, size) for stage, size in found.context_bytes.items()),
        *((f"workspace left by: {name}", workspace, size) for name, size in found.workspace_bytes.items()),
        *((_described(each), each.assumed_bytes, each.scratch_bytes) for each in found.scratch),
    ]
    figures += [
        (f"reserved for a request of {int(request):,} B", segment_bytes(int(request)), size)
        for request, size in found.segment_bytes.items()
    ]
    body = [[what, bytes_or_nothing(assumed), format_bytes(measured)] for what, assumed, measured in figures]
    settings = ", ".join(f"{name} {value}" for name, value in found.allocator.items())
    told = f"\nAllocator: {settings}. Device memory: {found.nvml_source}.\n"
    return _table(["what", "assumed", "measured"], body) + told


def segment_bytes(request: int) -> int:
    """What the simulated allocator reserves for a first request."""
    allocator = CachingAllocator()
    allocator.allocate(0, request)
    return allocator.reserved


def _described(scratch: Scratch) -> str:
    kernel = f" (`{scratch.kernel}`)" if scratch.kernel else ""
    return f"scratch of {scratch.operation}, {scratch.shape}{kernel}"

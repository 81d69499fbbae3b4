"""Write docs/accuracy.md from the records of runs on CUDA machines.

    python -m benchmarks.gpu.table             # writes the page
    python -m benchmarks.gpu.table --check     # 1 if the page is not the one that the records make
    python -m benchmarks.gpu.table --null-device  # the page about the null device, docs/accuracy-null-device.md
    python -m benchmarks.gpu.table --export D  # plan and measured run of each case, as badam-report reads them

Loads no torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from badam.errors import BadamError
from badam.plan import save_record
from badam.profiling.record import Machine
from benchmarks.gpu.draws import BudgetRecord, load_budget
from benchmarks.gpu.page import Machines, page
from benchmarks.gpu.record import Assumptions, CaseRecord, load_assumptions, load_case

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "benchmarks" / "records" / "gpu"
PAGE = ROOT / "docs" / "accuracy.md"
NULL_RECORDS = ROOT / "benchmarks" / "records" / "null_device"
NULL_PAGE = ROOT / "docs" / "accuracy-null-device.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, 1 if ``--check`` found another page."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.table", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--null-device", action="store_true", help="of the device that computes nothing")
    parser.add_argument("--records", type=Path)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--export", type=Path, metavar="DIR", help="write plans and measured runs there instead")
    options = parser.parse_args(arguments)
    options.records = options.records or (NULL_RECORDS if options.null_device else RECORDS)
    options.page = options.page or (NULL_PAGE if options.null_device else PAGE)
    if options.export is not None:
        print(f"{export(options.records, options.export)} cases exported to {options.export}")
        return 0
    text = page(machines(options.records), null_device=options.null_device)
    if options.check:
        current = options.page.read_text(encoding="utf-8") if options.page.exists() else ""
        if current != text:
            print(f"{options.page} is not what the records make; run python -m benchmarks.gpu.table", file=sys.stderr)
        return int(current != text)
    options.page.write_text(text, encoding="utf-8")
    return 0


def export(root: Path, target: Path) -> int:
    """Write ``NAME.plan.json`` and ``NAME.measured.json`` for each measured case; returns how many."""
    target.mkdir(parents=True, exist_ok=True)
    exported = [record for machine in machines(root) for record in machine.cases if record.run and record.plan]
    for record in exported:
        assert record.plan is not None
        assert record.run is not None
        save_record(record.plan, target / f"{record.case.name}.plan.json")
        save_record(record.run, target / f"{record.case.name}.measured.json")
    return len(exported)


def machines(root: Path) -> list[Machines]:
    """The records under ``root`` by the name of the card; records of no card, and other files, are passed over."""
    found: dict[str, Machines] = {}

    def of(machine: Machine) -> Machines:
        return found.setdefault(machine.device_name, Machines(machine.device_name, [], [], []))

    for path in sorted(root.rglob("*.json")):
        for record in _read(path):
            if record.machine is None or record.machine.device != "cuda":
                continue
            if isinstance(record, CaseRecord):
                of(record.machine).cases.append(record)
            elif isinstance(record, Assumptions):
                of(record.machine).assumptions.append(record)
            else:
                of(record.machine).budgets.append(record)
    return [found[name] for name in sorted(found)]


def _read(path: Path) -> Iterator[CaseRecord | Assumptions | BudgetRecord]:
    for load in (load_case, load_assumptions, load_budget):
        try:
            yield load(path)
        except BadamError:
            continue
        return


if __name__ == "__main__":
    sys.exit(main())

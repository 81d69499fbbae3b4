"""Predicted against measured memory on this CPU, through the three commands: writes docs/accuracy-cpu.md.

Twelve architectures, every method but qlora, activation checkpointing on and off, two lengths: each is
planned with badam-plan, trained with badam-train and compared with badam-report. What was measured is kept in
benchmarks/records/cpu after every case, and a call goes on where an earlier one stopped.

    python -m benchmarks.cpu_accuracy [--minutes 20] [--fresh] [--only llama]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.cpu.cases import all_cases
from benchmarks.cpu.page import page
from benchmarks.cpu.record import FOLDER, load_outcomes, save_outcomes

PAGE = Path(__file__).parents[1] / "docs" / "accuracy-cpu.md"


def main() -> None:
    """Measure what is not measured yet, as long as there is time, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="stop beginning new cases after so long")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--page", action="store_true", help="only write the page from what is kept")
    options = parser.parse_args()
    outcomes = load_outcomes()
    wanted = [] if options.page else [case for case in all_cases() if options.only in case.name]
    missing = [case for case in wanted if options.fresh or case.name not in outcomes or outcomes[case.name].refusal]
    end = time.monotonic() + 60 * options.minutes
    if missing:
        from benchmarks.cpu.run import import_everything, run_case

        import_everything()
        for number, case in enumerate(missing, start=1):
            if time.monotonic() > end:
                print(f"{len(missing) - number + 1} cases are left for another call", file=sys.stderr)
                break
            outcome = run_case(case)
            outcomes[case.name] = outcome
            save_outcomes([one for one in outcomes.values() if one.architecture == case.architecture], FOLDER)
            found = outcome.refusal or f"{outcome.worst_error:+.4%} at {outcome.worst_name}"
            print(f"{number}/{len(missing)} {case.name}: {found} ({outcome.seconds} s)", file=sys.stderr, flush=True)
    PAGE.write_text(page(list(outcomes.values()), list(all_cases())), encoding="utf-8")


if __name__ == "__main__":
    main()

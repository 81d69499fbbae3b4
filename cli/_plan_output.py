"""What ``badam-plan`` shows and writes: progress, the plan, its table, its page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from badam_cli._app import say

if TYPE_CHECKING:
    from badam_planner.search.result import Answer


@contextmanager
def progress_on_stderr() -> Iterator[Callable[[str], None]]:
    """A spinner on stderr with what is being done, where stderr is a terminal; silent elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _text: None
        return
    with console.status("starting") as status:
        yield status.update


def present(answer: Answer, output: Path, html: Path | None, *, epochs: float, as_json: bool) -> None:
    """Write the plan, show the table and say where the plan went, or print the plan alone; or raise the refusal."""
    from badam.plan import save_record

    plan = answer.plan
    if as_json:
        if answer.refusal is not None:
            raise answer.refusal
        assert plan is not None  # without a refusal there is a plan
        print(plan.model_dump_json(indent=2))
    else:
        if plan is not None:
            save_record(plan, output)  # before anything is printed: who reads it may close the pipe
        show(answer, epochs)
        if answer.refusal is not None:
            raise answer.refusal
        say(f"plan written to {output}")
    if html is not None:
        _write_html(answer, html)
        say(f"report written to {html}")


def show(answer: Answer, epochs: float) -> None:
    """The table of partitions, and what is in the peak, the time and the transfers of the one shown."""
    from rich.console import Console

    from badam_planner.multi_gpu.engines import engine_of
    from badam_planner.report.terminal.plan import (
        render_candidates,
        render_largest,
        render_peak,
        render_time,
        render_transfers,
    )

    console, result = Console(), answer.result
    shown = next((candidate for candidate in result.candidates if candidate.recommended), result.candidates[0])
    console.print(render_candidates(result))
    console.print()
    console.print(render_peak(shown, result.usable_bytes))
    console.print()
    console.print(render_largest(shown))
    if answer.plan is not None:
        console.print()
        console.print(render_time(answer.plan, epochs))
        if engine_of(answer.plan.target).joins_gpus:
            console.print(render_transfers(answer.plan))


def _write_html(answer: Answer, html: Path) -> None:
    from badam_planner.report.html.gather import rehearse_step, sizes_that_fit
    from badam_planner.report.html.pages import write_plan_html

    plan = answer.plan
    assert plan is not None  # a refusal has no page
    with progress_on_stderr() as progress:
        progress("rehearsing one step to draw it")
        timeline = rehearse_step(plan)
        sizes = sizes_that_fit(plan, progress)
    write_plan_html(plan, html, result=answer.result, timeline=timeline, sizes=sizes)

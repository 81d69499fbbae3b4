"""What several cards send each other in a step, in the terminal."""

from __future__ import annotations

from rich.table import Table

from badam.plan import Plan
from badam.units import format_bytes
from badam_planner.links import transfer_times


def render_transfers(plan: Plan) -> Table:
    """Bytes that each card sends in a step and the time for them, beside those of training everything."""
    target, prediction = plan.target, plan.prediction
    assert prediction is not None, "a plan for several cards has a prediction"
    assert prediction.sent_bytes is not None, "and bytes that they send"
    assert prediction.sent_bytes_of_full is not None, "and those of training everything"
    table = Table(title=f"{target.num_gpus} cards, {target.engine}: sent by each card in a step", title_justify="left")
    table.add_column("link, nominal rate")
    table.add_column("this plan", justify="right")
    table.add_column("all parameters trained", justify="right")
    table.add_row("bytes", format_bytes(prediction.sent_bytes), format_bytes(prediction.sent_bytes_of_full))
    own = transfer_times(prediction.sent_bytes, target.num_gpus, target.gpus_per_node)
    full = transfer_times(prediction.sent_bytes_of_full, target.num_gpus, target.gpus_per_node)
    for (name, seconds), (_, everything) in zip(own, full, strict=True):
        table.add_row(name, f"{seconds:.3f} s", f"{everything:.3f} s")
    return table

"""What several cards send each other in a step, in the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from badam.plan import Plan, Target
from badam.units import format_bytes, format_seconds
from badam_planner.multi_gpu.links import step_range, transfer_times
from badam_planner.multi_gpu.nccl import communicators


def render_transfers(plan: Plan) -> RenderableType:
    """Bytes that each card sends in a step and the time for them, beside those of training everything."""
    target, prediction = plan.target, plan.prediction
    assert prediction is not None, "a plan for several cards has a prediction"
    assert prediction.sent_bytes is not None, "and bytes that they send"
    assert prediction.sent_bytes_of_full is not None, "and those of training everything"
    title = f"{_gpus_in_words(target)}: sent by each card in a step"
    table = Table(
        title=title,
        title_justify="left",
        title_style="",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        header_style="bold",
    )
    table.add_column("link, nominal rate")
    table.add_column("this plan", justify="right")
    table.add_column("all parameters trained", justify="right")
    compute = prediction.step_seconds
    if compute is not None:
        table.add_column("a step of this plan", justify="right")
    sent = (prediction.sent_bytes, prediction.sent_bytes_of_full)
    between = (prediction.sent_between_bytes, prediction.sent_between_bytes_of_full)
    if target.engine == "ddp":
        between = sent  # plans of before there were cut copies do not say it
    table.add_row("bytes", *map(format_bytes, sent))
    if target.replicas > 1 and target.shards > 1:
        table.add_row("of these between the copies", *(format_bytes(size or 0) for size in between))
    columns = [
        transfer_times(target, whole - (part or 0), part or 0) for whole, part in zip(sent, between, strict=True)
    ]
    for (name, seconds), (_, everything) in zip(*columns, strict=True):
        step = [] if compute is None else [_range_in_words(step_range(compute, seconds, target.engine))]
        table.add_row(name, *(format_seconds(each, rough=True) for each in (seconds, everything)), *step)
    return Group(table, *_step_in_words(plan), *_library_in_words(target), *_host_in_words(plan))


def _range_in_words(seconds: tuple[float, float]) -> str:
    shortest, longest = (format_seconds(each, rough=True) for each in seconds)
    return longest if shortest == longest else f"{shortest} to {longest}"


def _step_in_words(plan: Plan) -> list[Text]:
    if plan.prediction is None or plan.prediction.step_seconds is None:
        return []
    when = (
        "after backward, which computes the active block last"
        if plan.target.engine == "ddp"
        else "while the card computes, altogether or not at all"
    )
    return [
        Text(
            f"A step: computation, the mean over blocks, and transfers, those of the block that sends most, {when}. "
            "Collectives do not reach the nominal rates."
        )
    ]


def _library_in_words(target: Target) -> list[Text]:
    if not target.communication_bytes:
        return []
    joined = ", ".join(str(size) for size in communicators(target))
    return [
        Text(
            f"The device peak has {format_bytes(target.communication_bytes)} for NCCL, with communicators of {joined} "
            "cards: an assumption from what others measured."
        )
    ]


def _host_in_words(plan: Plan) -> list[Text]:
    target, host_bytes = plan.target, plan.prediction.host_bytes if plan.prediction else None
    if host_bytes is None:
        return []
    here = min(target.num_gpus, target.gpus_per_node)
    what = "masters, moments and gradients" + (", and the parts of all parameters" if target.offload == "all" else "")
    return [
        Text(
            f"Offloaded: {format_bytes(host_bytes)} of host memory for each process, {format_bytes(here * host_bytes)} "
            f"on a machine with {here}: {what}. The closed form counts what stays on a card."
        )
    ]


def _gpus_in_words(target: Target) -> str:
    cards = f"{target.num_gpus} cards, {target.engine}"
    if target.replicas > 1 and target.shards > 1:
        return f"{cards}, {target.replicas} copies of the model over {target.shards} cards each"
    return cards

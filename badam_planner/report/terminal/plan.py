"""The planner's result for the terminal: a row per candidate, the recommended one marked by more than colour."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from badam.plan import Plan, Target
from badam.units import format_bytes, format_count, format_seconds
from badam.vocabulary import Category, Phase
from badam_planner.composition.step_time import ONCE_PER_VISIT
from badam_planner.multi_gpu.engines import engine_of
from badam_planner.multi_gpu.links import step_range, transfer_times
from badam_planner.multi_gpu.nccl import communicators
from badam_planner.report.formulas import formula_of, formulas_in_words, letters_in_words
from badam_planner.report.terminal.bars import Bar, StackedBars
from badam_planner.report.text import SizeUnit, clean, shorten, unit_for
from badam_planner.search.result import Candidate, SearchResult

ONE_LINE_WIDTH = 100
"""From this width on every figure has a column; below it two share one, and none is dropped."""

EXPLANATION = "Backward: mean over blocks; all blocks active is 100%."


EXPANDABLE = (
    "badam-train switches them on; for a loop of your own set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True."
)


def render_candidates(result: SearchResult) -> RenderableType:
    """The table of candidates with a line on what the columns mean, for ``console.print``."""
    heading = Text(f"{clean(result.model_id)} on {clean(result.gpu_name)}", style="bold")
    heading.append(f", {format_bytes(result.usable_bytes)} usable, batch {result.batch}", "not bold")
    unit = unit_for(max(candidate.peak_device_bytes for candidate in result.candidates))
    states = _states_title(result.candidates)
    words = f"{states}: model states only"
    if states == SEVERAL_FORMULAS:
        methods = [candidate.method for candidate in result.candidates]
        words = f"States only: {formulas_in_words(methods)}; {letters_in_words(methods)}"
    explanation = Text(f"Sizes in {unit.name}. {words}. {EXPLANATION}")
    growing = [_blocks_of(candidate) for candidate in result.candidates if candidate.expandable_segments]
    notes = [Text(f"With expandable segments: {', '.join(growing)}. {EXPANDABLE}")] if growing else []
    left_out = [Text(f"left out: {method}. {clean(reason)}") for method, reason in result.left_out]
    return Group(heading, Text(), _Candidates(result.candidates, unit), explanation, *notes, *left_out)


def render_peak(candidate: Candidate, usable_bytes: int) -> RenderableType:
    """One bar of what the peak of a candidate is made of."""
    parts = tuple((name.value, candidate.by_category[name]) for name in Category if name in candidate.by_category)
    limit = usable_bytes - (candidate.peak_device_bytes - candidate.peak_reserved_bytes)
    return StackedBars((Bar(f"peak in {candidate.peak_phase}", "", parts),), limit)


def render_time(plan: Plan, epochs: float = 1.0) -> RenderableType:
    """How long a step, an epoch and ``epochs`` of them are predicted to take, and on what assumption."""
    prediction, rates = plan.prediction, plan.target.rates
    if prediction is None or prediction.step_seconds is None or rates is None:
        return Text(
            f"How long a step takes on {clean(plan.target.gpu)} is not known before a run has been measured there."
        )
    parts = [
        f"{phase} {format_seconds(prediction.seconds_by_phase[phase], rough=True)}"
        for phase in Phase
        if phase not in ONCE_PER_VISIT and phase in prediction.seconds_by_phase
    ]
    whole = format_seconds(prediction.step_seconds, rough=True)
    text = f"One step takes about {whole}, the mean over blocks ({', '.join(parts)})"
    if prediction.epoch_seconds is not None:
        text += f", an epoch {format_seconds(prediction.epoch_seconds, rough=True)}"
        if epochs != 1:
            text += f", {epochs:g} epochs {format_seconds(epochs * prediction.epoch_seconds, rough=True)}"
    return Text(f"{text}, {clean(rates.basis)}.")


def render_largest(candidate: Candidate) -> RenderableType:
    """The largest tensors that are alive at the peak, with what share of it each is."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column(f"largest at the peak, block {clean(candidate.peak_block)} active", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    for name, nbytes in candidate.largest:
        table.add_row(Text(clean(name)), format_bytes(nbytes), f"{100 * nbytes / candidate.peak_allocated_bytes:.1f}%")
    return table


class _Candidates:
    """A table that chooses its layout when it learns the width of the console."""

    def __init__(self, candidates: tuple[Candidate, ...], unit: SizeUnit) -> None:
        self._candidates = candidates
        self._unit = unit

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.max_width >= ONE_LINE_WIDTH
        recommended, too_big = (">", "x") if options.ascii_only else ("▶", "✗")
        titles, padding = (WIDE_COLUMNS, 0) if wide else (NARROW_COLUMNS, 1)
        columns = tuple(title.format(states=_states_title(self._candidates)) for title in titles)
        rows = []
        for candidate in self._candidates:
            mark = recommended if candidate.recommended else (" " if candidate.fits else too_big)
            rows.append((_wide_figures if wide else _narrow_figures)(candidate, mark, self._unit))
        # The figures are never cut; the place of the peak gets what they leave.
        figures = [max(map(_width, column)) for column in zip(columns, *rows, strict=False)]
        peak_width = options.max_width - sum(figures) - (1 + padding) * len(figures)
        table = _table((*columns, PEAK), padding=padding)
        for candidate, row in zip(self._candidates, rows, strict=True):
            style = "bold" if candidate.recommended else ("" if candidate.fits else "dim")
            table.add_row(*map(Text, row), Text(_place(candidate, peak_width)), style=style)
        yield table
        meanings = []
        if any(candidate.recommended for candidate in self._candidates):
            meanings.append(f"{recommended} recommended")
        if not all(candidate.fits for candidate in self._candidates):
            meanings.append(f"{too_big} does not fit")
        yield Text("   ".join(meanings))


SEVERAL_FORMULAS = "states"


def _states_title(candidates: Sequence[Candidate]) -> str:
    """The closed form that the candidates share, or a word where they have several."""
    formulas = {formula_of(candidate.method) for candidate in candidates}
    return formulas.pop() if len(formulas) == 1 else SEVERAL_FORMULAS


CANDIDATE = "  blocks by\n  ckpt, loss"
WIDE_COLUMNS: tuple[str, ...] = (
    CANDIDATE,
    "D",
    "largest",
    "{states}",
    "alloc.",
    "reserved",
    "device",
    "headroom",
    "backw.",
)
NARROW_COLUMNS: tuple[str, ...] = (
    CANDIDATE,
    "D\nlargest",
    "{states}\nbackward",
    "alloc.\nreserved",
    "device\nheadroom",
)
PEAK = "peak in\nmodule"


def _table(columns: tuple[str, ...], *, padding: int) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, padding, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, justify="left" if name in (CANDIDATE, PEAK) else "right", no_wrap=True)
    return table


def _width(cell: str) -> int:
    return max(len(line) for line in cell.split("\n"))


def _wide_figures(candidate: Candidate, mark: str, unit: SizeUnit) -> tuple[str, ...]:
    return (
        _setting(candidate, mark),
        str(candidate.num_blocks),
        format_count(candidate.largest_block_parameters),
        unit.number(candidate.formula_bytes),
        unit.number(candidate.peak_allocated_bytes),
        unit.number(candidate.peak_reserved_bytes),
        unit.number(candidate.peak_device_bytes),
        _headroom(candidate, unit),
        f"{candidate.backward_relative:.0%}",
    )


def _narrow_figures(candidate: Candidate, mark: str, unit: SizeUnit) -> tuple[str, ...]:
    return (
        _setting(candidate, mark),
        f"{candidate.num_blocks}\n{format_count(candidate.largest_block_parameters)}",
        f"{unit.number(candidate.formula_bytes)}\n{candidate.backward_relative:.0%}",
        f"{unit.number(candidate.peak_allocated_bytes)}\n{unit.number(candidate.peak_reserved_bytes)}",
        f"{unit.number(candidate.peak_device_bytes)}\n{_headroom(candidate, unit)}",
    )


def _setting(candidate: Candidate, mark: str) -> str:
    return f"{mark} {_blocks_of(candidate)}\n  {candidate.checkpointing}, {candidate.loss}"


def _blocks_of(candidate: Candidate) -> str:
    if candidate.method == "hift":
        return f"hift {candidate.strategy}"
    return candidate.strategy if candidate.method == "badam" else candidate.method


def _headroom(candidate: Candidate, unit: SizeUnit) -> str:
    sign = "+" if candidate.headroom_bytes > 0 else ""
    return f"{sign}{unit.number(candidate.headroom_bytes)}"


def _place(candidate: Candidate, width: int) -> str:
    return f"{candidate.peak_phase}\n{shorten(clean(candidate.peak_module), max(width, 8))}"


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
    engine = engine_of(target)
    if not engine.cuts_model:
        between = sent  # plans of before there were cut copies do not say it
    table.add_row("bytes", *map(format_bytes, sent))
    if target.replicas > 1 and target.shards > 1:
        table.add_row("of these between the copies", *(format_bytes(size or 0) for size in between))
    columns = [
        transfer_times(target, whole - (part or 0), part or 0) for whole, part in zip(sent, between, strict=True)
    ]
    for (name, seconds), (_, everything) in zip(*columns, strict=True):
        step = [] if compute is None else [_range_in_words(step_range(compute, seconds, overlaps=engine.overlaps))]
        table.add_row(name, *(format_seconds(each, rough=True) for each in (seconds, everything)), *step)
    return Group(table, *_step_in_words(plan), *_library_in_words(target), *_host_in_words(plan))


def _range_in_words(seconds: tuple[float, float]) -> str:
    shortest, longest = (format_seconds(each, rough=True) for each in seconds)
    return longest if shortest == longest else f"{shortest} to {longest}"


def _step_in_words(plan: Plan) -> list[Text]:
    if plan.prediction is None or plan.prediction.step_seconds is None:
        return []
    when = (
        "while the card computes, altogether or not at all"
        if engine_of(plan.target).overlaps
        else "after backward, which computes the active block last"
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

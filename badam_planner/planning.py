"""From a request to a ranked list of candidates and a plan: the order of events of badam-plan.

Reads the card and the model (``probe``), lets ``search`` decide what to try and what wins, and asks ``probe.evaluate``
what each candidate needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from math import inf

from badam.errors import BadamError, DoesNotFit, InputError
from badam.partition import partition_parameters
from badam.plan import (
    Attention,
    BlockPlan,
    Dtype,
    Method,
    MethodOptions,
    ModelSpec,
    OptimizerSpec,
    Partition,
    PhaseWork,
    Plan,
    Prediction,
    Provenance,
    Schedule,
    SwitchMode,
    Target,
    Training,
)
from badam.training.assemble import model_config
from badam.training.methods import METHODS, method_of
from badam.training.tasks import TRAINED_HERE, input_positions
from badam.units import format_batch, format_bytes
from badam.vocabulary import Phase
from badam_planner.duration import Effort, mean_efforts, step_seconds
from badam_planner.probe.cards import CardsEvaluator, smallest_number, with_traffic
from badam_planner.probe.evaluate import Evaluator, PlanForecast
from badam_planner.probe.model_source import explaining
from badam_planner.probe.model_tree import ModelTree, inspect_model
from badam_planner.result import Answer, Candidate, SearchResult
from badam_planner.search import Cut, Relief, Setting, ladder, recommended_index, relief, strategies

Progress = Callable[[str], None]

BYTES_PER_WEIGHT: dict[Dtype, int] = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for; "auto" leaves the choice to the search."""

    spec: ModelSpec
    target: Target
    method: Method = "badam"
    compare_methods: bool = False
    partition: str = "auto"
    include_embedding: bool = False
    include_lm_head: bool = False
    active_modules: tuple[str, ...] = ()
    batch_size: int = 1
    seq_len: int = 512
    decoder_len: int | None = None
    grad_accum: int = 1
    dtype: Dtype = "bfloat16"
    checkpointing: str = "auto"
    loss: str = "auto"
    expandable_segments: str = "auto"
    attention: Attention = "sdpa"
    switch_every: int | None = None
    switch_mode: SwitchMode = "random"
    samples: int | None = None
    epochs: float = 1.0
    learning_rate: float = 1e-5
    options: MethodOptions = field(default_factory=MethodOptions)
    seed: int = 0
    exact: bool = False
    find_num_gpus: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < inf:
            raise InputError(
                f"{self.learning_rate} is no learning rate.", advice="Give a positive number: --learning-rate 1e-5."
            )
        if self.target.engine != "single" and (self.method != "badam" or self.compare_methods):
            raise InputError(
                f"Only --method badam can be planned for several cards, not {self.method}"
                + (" beside other methods." if self.compare_methods else "."),
                advice="Plan other methods with --engine single.",
            )
        if self.target.engine != "single" and self.spec.task not in TRAINED_HERE:
            raise InputError(
                f"Training for {self.spec.task} can be planned for one card only, not for several.",
                advice="Plan it with --engine single.",
            )


def make_plan(request: Request, progress: Progress = lambda _text: None, *, workers: int = 1) -> Answer:
    """Try every partition that the request leaves open and plan the one to recommend.

    Args:
        request: what the user asked for.
        progress: is told what is being done.
        workers: processes to rehearse on; more than one are forks of this one.

    The refusal, if nothing fits, says by how much, what is largest, and which options would fit.

    Raises:
        InputError: if the model cannot be cut or rehearsed as the request asks.
    """
    with explaining(request.spec.id):
        return _made(request, progress, workers)


def _made(request: Request, progress: Progress, workers: int) -> Answer:
    progress(f"building the module tree of {request.spec.id}")
    evaluator = CardsEvaluator(inspect_model(request.spec, request.attention), exact=request.exact, workers=workers)
    request = _with_enough_cards(request, evaluator, progress)
    asked_for = strategies(request.method, request.partition)
    _rehearse_ahead(request, asked_for, evaluator, progress)
    tried = [_first_that_fits(request, strategy, evaluator, progress) for strategy in asked_for]
    fits = [_headroom(request, forecast) >= 0 for _, forecast in tried]
    best = recommended_index(fits)
    compared, left_out = _other_methods(request, evaluator, progress) if request.compare_methods else ([], [])
    candidates = tuple(
        _candidate(request, plan, forecast, recommended=index == best and fits[best])
        for index, (plan, forecast) in enumerate([*tried, *compared])
    )
    result = SearchResult(
        model_id=request.spec.id,
        gpu_name=request.target.gpu,
        usable_bytes=request.target.usable_bytes,
        batch_size=request.batch_size,
        seq_len=request.seq_len,
        candidates=candidates,
        left_out=tuple(left_out),
        task=request.spec.task,
        decoder_len=request.decoder_len,
    )
    if not fits[best]:
        return Answer(result, None, _refusal(request, tried, evaluator, progress))
    plan, forecast = tried[best]
    progress("forecasting every block of the recommended partition")
    planned = with_prediction(plan, evaluator.every_block(plan, forecast), request.samples)
    return Answer(result, with_traffic(planned, evaluator), None)


def _rehearse_ahead(request: Request, asked_for: Sequence[Cut], evaluator: CardsEvaluator, progress: Progress) -> None:
    """What the search is going to ask for if the fastest setting fits, on all workers at a time."""
    fastest = _ladder(request, evaluator.tree)[0]
    progress(f"rehearsing {', '.join(asked_for)} blocks, {_in_words(fastest)}")
    plans = [staged_plan(request, strategy, fastest, evaluator.tree) for strategy in asked_for]
    plans = [plan for plan in plans if method_of(plan.method).composes]
    largest = [(plan, evaluator.decisive(plan)[0]) for plan in plans]
    in_the_middle = [(plan, len(plan.partition.blocks) // 2) for plan in plans[:1]]  # these answer for most others
    evaluator.prepare([*largest, *in_the_middle])
    limit = request.target.usable_bytes - request.target.context_bytes
    promising = [plan for plan, index in largest if evaluator.peaks(plan, index).peak_allocated_bytes <= limit]
    decisive = [(plan, index) for plan in promising for index in evaluator.decisive(plan)]
    recommended = [(plan, index) for plan in promising[:1] for index in range(len(plan.partition.blocks))]
    evaluator.prepare([*decisive, *recommended])


def _with_enough_cards(request: Request, evaluator: CardsEvaluator, progress: Progress) -> Request:
    """The request for the smallest number of cards on which it fits at its leanest, if it leaves their number open."""
    if not request.find_num_gpus:
        return request

    def on(cards: int) -> Request:
        return replace(request, target=request.target.model_copy(update={"num_gpus": cards}))

    def fits(cards: int) -> bool:
        progress(f"trying {cards} cards")
        kinds = reversed(strategies(request.method, request.partition))
        return any(_fits_at_its_leanest(on(cards), strategy, evaluator) for strategy in kinds)

    return on(smallest_number(fits) or request.target.num_gpus)


def staged_plan(request: Request, strategy: Cut, setting: Setting, tree: ModelTree) -> Plan:
    """The plan of one candidate, without its prediction."""
    blocks = _blocks(request, strategy, tree)
    layers = tree.layers if setting.checkpointing == "all" else ()
    blocks = [block.model_copy(update={"checkpointed_layers": layers}) for block in blocks]
    return Plan(
        model=request.spec,
        target=request.target.model_copy(update={"expandable_segments": setting.expandable_segments}),
        method=request.method,
        partition=Partition(strategy=strategy, blocks=tuple(blocks), active_modules=_always_active(request)),
        schedule=Schedule(
            switch_mode=request.switch_mode if request.method != "hift" else "ascending",
            switch_every=visit_length(request, len(blocks)),
            seed=request.seed,
        ),
        training=Training(
            batch_size=request.batch_size,
            seq_len=request.seq_len,
            decoder_len=request.decoder_len,
            grad_accum=request.grad_accum,
            dtype=request.dtype,
            checkpointing=setting.checkpointing,
            loss=setting.loss,
            attention=request.attention,
            optimizer=OptimizerSpec(
                learning_rate=request.learning_rate, max_grad_norm=1.0 if method_of(request.method).clips else 0.0
            ),
            options=request.options,
        ),
        provenance=Provenance(
            versions=tree.versions, command=request.command, date=datetime.now(UTC).isoformat(timespec="seconds")
        ),
    )


def _always_active(request: Request) -> tuple[str, ...]:
    """What the user wants trained in every visit.

    Raises:
        InputError: for a method without visits.
    """
    if request.active_modules and "layer" not in strategies(request.method, "auto"):
        raise InputError(
            f"{request.method} has no blocks, so nothing can be active besides them.",
            advice="Leave --active-module out, or plan with --method badam.",
        )
    return request.active_modules


def _blocks(request: Request, strategy: Cut, tree: ModelTree) -> list[BlockPlan]:
    """The blocks of a strategy; methods without blocks have one, "all"."""
    if strategy == "full":
        prefixes = tuple(dict.fromkeys(info.name.split(".", 1)[0] for info in tree.parameters))
        return [BlockPlan(name="all", prefixes=prefixes, parameters=request.spec.parameters)]
    cut = partition_parameters(
        tree.parameters,
        "layer" if strategy == "ratio" else strategy,
        include_embedding=request.include_embedding,
        include_lm_head=request.include_lm_head,
    )
    if strategy == "ratio":
        prefixes = tuple(prefix for block in cut for prefix in block.prefixes)
        return [BlockPlan(name="all", prefixes=prefixes, parameters=sum(block.parameters for block in cut))]
    return [BlockPlan(name=block.name, prefixes=block.prefixes, parameters=block.parameters) for block in cut]


def visit_length(request: Request, blocks: int) -> int:
    """Steps per visit K: what the user asked for, else min(max(n / (B D), 50), 100) for n samples per epoch.

    HiFT goes on to the next block in every step.

    Source: arXiv 2404.02827, appendix on hyperparameters. Without a number of samples the lower bound is taken.
    """
    if request.switch_every is not None:
        return request.switch_every
    if request.method == "hift":
        return 1
    per_step = request.batch_size * request.grad_accum * blocks
    return min(max((request.samples or 0) // per_step, 50), 100)


def formula_bytes(plan: Plan, forecast: PlanForecast) -> int:
    """Closed form of the model states that the plan's method keeps, with the entries that ``forecast`` counts."""
    whole = method_of(plan.method).state_bytes(
        plan.model.parameters,
        forecast.trained_entries,
        len(plan.partition.blocks),
        quantized=forecast.quantized_entries,
    )
    return -(-whole // plan.target.num_gpus) if plan.target.engine in ("fsdp2", "zero3") else whole


def _other_methods(
    request: Request, evaluator: Evaluator, progress: Progress
) -> tuple[list[tuple[Plan, PlanForecast]], list[tuple[str, str]]]:
    """Of every other method the first partition that fits, or its last; and those that cannot be planned, with why."""
    found, left_out = [], []
    for method in METHODS:
        if method == request.method:
            continue
        other = replace(request, method=method)
        try:
            with explaining(f"{request.spec.id} under {method}"):
                for strategy in strategies(method, "auto"):
                    progress(f"comparing with {method}")
                    candidate = _first_that_fits(other, strategy, evaluator, progress)
                    if _headroom(other, candidate[1]) >= 0:
                        break
            found.append(candidate)
        except BadamError as error:  # the others can still be compared
            left_out.append((str(method), error.message))
    return found, left_out


def _first_that_fits(
    request: Request, strategy: Cut, evaluator: Evaluator, progress: Progress
) -> tuple[Plan, PlanForecast]:
    """The fastest setting of a partition that fits, or the leanest one, which is the ladder's last."""
    *faster, leanest = _ladder(request, evaluator.tree)
    for setting in faster:
        progress(f"rehearsing {strategy} blocks, {_in_words(setting)}")
        plan = staged_plan(request, strategy, setting, evaluator.tree)
        forecast = evaluator.worst_block(plan, give_up_above=request.target.usable_bytes)
        if forecast is not None:
            return plan, forecast
    progress(f"rehearsing {strategy} blocks, {_in_words(leanest)}")
    plan = staged_plan(request, strategy, leanest, evaluator.tree)
    return plan, evaluator.worst_block(plan)


def _ladder(request: Request, tree: ModelTree) -> tuple[Setting, ...]:
    """The settings that the request leaves open; the CPU's allocator has no segments."""
    grows = "off" if request.target.gpu == "cpu" else request.expandable_segments
    return ladder(request.checkpointing, request.loss, tree.can_chunk, expandable_segments=grows)


def _in_words(setting: Setting) -> str:
    words = f"checkpointing {setting.checkpointing}, {setting.loss} loss"
    return f"{words}, expandable segments" if setting.expandable_segments else words


def _batch_in_words(request: Request) -> str:
    return format_batch(request.spec.task, request.batch_size, request.seq_len, request.decoder_len)


def _headroom(request: Request, forecast: PlanForecast) -> int:
    return request.target.usable_bytes - forecast.worst.peak_device_bytes


def _candidate(request: Request, plan: Plan, forecast: PlanForecast, *, recommended: bool) -> Candidate:
    worst, blocks = forecast.worst, plan.partition.blocks
    return Candidate(
        method=plan.method,
        strategy=plan.partition.strategy,
        num_blocks=len(blocks),
        largest_block_parameters=forecast.trained_entries,
        checkpointing=plan.training.checkpointing,
        loss=plan.training.loss,
        formula_bytes=formula_bytes(plan, forecast),
        peak_allocated_bytes=worst.peak_allocated_bytes,
        peak_reserved_bytes=worst.peak_reserved_bytes,
        peak_device_bytes=worst.peak_device_bytes,
        peak_phase=worst.peak_phase,
        peak_module=worst.peak_module,
        peak_block=blocks[forecast.worst_block].name,
        headroom_bytes=_headroom(request, forecast),
        backward_relative=sum(forecast.backward_relative) / len(forecast.backward_relative),
        by_category=worst.by_category,
        by_phase=worst.by_phase,
        fits=_headroom(request, forecast) >= 0,
        recommended=recommended,
        largest=worst.largest,
        expandable_segments=plan.target.expandable_segments,
    )


def with_prediction(plan: Plan, forecast: PlanForecast, samples: int | None = None) -> Plan:
    """The plan with what is predicted for each block and for the worst one.

    Args:
        plan: without a prediction.
        forecast: of every block.
        samples: sequences of an epoch, if known.
    """
    worst = forecast.worst
    means = mean_efforts(forecast.efforts)
    knows_rates = plan.target.rates is not None
    blocks = plan.partition.blocks
    if forecast.blocks:  # a method that trains several blocks at a time has no peak of one of them
        blocks = tuple(
            block.model_copy(
                update={
                    "peak_allocated_bytes": own.peak_allocated_bytes,
                    "peak_phase": own.peak_phase,
                    "peak_by_phase": own.by_phase,
                    "backward_relative": relative,
                    "seconds_by_phase": _seconds(efforts) if knows_rates else {},
                }
            )
            for block, own, relative, efforts in zip(
                blocks, forecast.blocks, forecast.backward_relative, forecast.efforts, strict=True
            )
        )
    seconds = step_seconds(_seconds(means), plan.schedule.switch_every) if knows_rates else None
    sequences = plan.training.batch_size * plan.training.grad_accum
    prediction = Prediction(
        peak_allocated_bytes=worst.peak_allocated_bytes,
        peak_reserved_bytes=worst.peak_reserved_bytes,
        peak_device_bytes=worst.peak_device_bytes,
        formula_bytes=formula_bytes(plan, forecast),
        by_category=worst.by_category,
        by_phase=worst.by_phase,
        peak_phase=worst.peak_phase,
        peak_module=worst.peak_module,
        peak_block=blocks[forecast.worst_block].name,
        work_by_phase={
            phase: PhaseWork(
                flops=round(effort.flops),
                product_bytes=round(effort.product_bytes),
                other_bytes=round(effort.other_bytes),
                operators=round(effort.operators),
            )
            for phase, effort in means.items()
        },
        seconds_by_phase=_seconds(means) if knows_rates else {},
        step_seconds=seconds,
        epoch_seconds=None if seconds is None or not samples else seconds * -(-samples // sequences),
    )
    partition = plan.partition.model_copy(update={"blocks": blocks})
    return plan.model_copy(update={"partition": partition, "prediction": prediction})


def _seconds(efforts: Mapping[Phase, Effort]) -> dict[Phase, float]:
    return {phase: effort.seconds for phase, effort in efforts.items()}


def _refusal(
    request: Request, tried: list[tuple[Plan, PlanForecast]], evaluator: Evaluator, progress: Progress
) -> DoesNotFit:
    """Why nothing fits, and the mildest change that would make it fit."""
    plan, forecast = min(tried, key=lambda pair: pair[1].worst.peak_device_bytes)
    worst, training = forecast.worst, plan.training
    setting = Setting(training.checkpointing, training.loss, plan.target.expandable_segments)
    category, size = max(worst.by_category.items(), key=lambda item: item[1])
    message = (
        f"{request.spec.id} needs {format_bytes(worst.peak_device_bytes)} at its leanest "
        f"({plan.partition.strategy} blocks, {_in_words(setting)}, "
        f"batch {_batch_in_words(request)}), {request.target.gpu} offers "
        f"{format_bytes(request.target.usable_bytes)}: {format_bytes(-_headroom(request, forecast))} too much. "
        f"The largest part is {category}, {format_bytes(size)}, at the peak in {worst.peak_phase}."
    )
    options = _what_would_fit(request, evaluator, progress)
    if options is None and request.method != "badam":
        options = _what_would_fit(replace(request, method="badam"), evaluator, progress)
        options = options and f"--method badam {options}"
    if options is not None:
        return DoesNotFit(message, advice=f"This would fit: {options}")
    weights = request.spec.parameters * BYTES_PER_WEIGHT[request.dtype]
    return DoesNotFit(
        message,
        advice="No batch size, length or partition makes it fit: the weights alone take "
        f"{format_bytes(weights)}. Choose a larger card or a smaller model.",
    )


def _what_would_fit(request: Request, evaluator: Evaluator, progress: Progress) -> str | None:
    """The options of the mildest change with which the request fits, as the user would type them."""
    fixed = input_positions(model_config(request.spec), request.spec.task) is not None
    sizes = list(relief(request.batch_size, request.seq_len, **({"shortest": request.seq_len} if fixed else {})))
    kinds = strategies(request.method, "auto")

    def resized(size: Relief) -> Request:
        smaller = replace(request, batch_size=size.batch_size, seq_len=size.seq_len)
        progress(f"trying batch {_batch_in_words(smaller)}")
        return replace(smaller, checkpointing="auto", loss="auto", expandable_segments="auto")

    if not any(_fits_at_its_leanest(resized(sizes[-1]), strategy, evaluator) for strategy in reversed(kinds)):
        return None
    for size in sizes:
        for strategy in kinds:
            smaller = resized(size)
            if _fits_at_its_leanest(smaller, strategy, evaluator):
                plan, _ = _first_that_fits(smaller, strategy, evaluator, progress)
                levers = [f"--checkpointing {plan.training.checkpointing}", f"--loss {plan.training.loss}"]
                if plan.target.expandable_segments and request.expandable_segments == "off":
                    levers.append("--expandable-segments on")
                partition = () if strategy == "full" else (f"--partition {strategy}",)
                return " ".join((*size.options, *partition, *levers))
    return None


def _fits_at_its_leanest(request: Request, strategy: Cut, evaluator: Evaluator) -> bool:
    """Whether a partition fits with the ladder's last setting; found out with its first block that is too large."""
    leanest = _ladder(request, evaluator.tree)[-1]
    plan = staged_plan(request, strategy, leanest, evaluator.tree)
    return evaluator.worst_block(plan, give_up_above=request.target.usable_bytes) is not None

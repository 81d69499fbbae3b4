"""From a request to a ranked list of candidates and a plan: the order of events of badam-plan.

Reads the card and the model (``probe``), lets ``search`` decide what to try and what wins, and asks ``probe.evaluate``
what each candidate needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from badam.errors import BadamError
from badam.plan import Plan
from badam.training.methods import METHODS, method_of
from badam.units import format_bytes
from badam.vocabulary import ELEMENT_BYTES, Strategy
from badam_planner.multi_gpu.gpu_count import MOST_GPUS, guessed_number, shard_sizes, smallest_number
from badam_planner.multi_gpu.nccl import with_nccl
from badam_planner.rehearsal.evaluator import Evaluator, PlanForecast
from badam_planner.rehearsal.model_tree import inspect_model, unquantized_weights
from badam_planner.search.model_spec import explaining
from badam_planner.search.prediction import candidate_of, with_prediction, with_releases, with_traffic
from badam_planner.search.refusal import Squeezed, refusal, releases_in_words
from badam_planner.search.request import Request, check_engine, staged_plan
from badam_planner.search.result import Answer, SearchResult
from badam_planner.search.settings import recommended_index, strategies
from badam_planner.search.trial import (
    Progress,
    first_that_fits,
    fits_at_its_leanest,
    headroom,
    in_words,
    settings_of,
)

WORTH_SAYING = 0.01
"""Share of the layers' entries that a quantizing method may leave without a word."""

MOST_NAMED = 4

__all__ = ["Progress", "Request", "make_plan", "staged_plan", "with_prediction"]


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
    check_engine(request)
    with explaining(request.spec.id):
        return _made(request, progress, workers)


def _made(request: Request, progress: Progress, workers: int) -> Answer:
    progress(f"building the module tree of {request.spec.id}")
    evaluator = Evaluator(inspect_model(request.spec, request.attention), exact=request.exact, workers=workers)
    request = _with_enough_gpus(request, evaluator, progress)
    asked_for = strategies(request.method, request.partition)
    _rehearse_ahead(request, asked_for, evaluator, progress)
    tried = [first_that_fits(request, strategy, evaluator, progress) for strategy in asked_for]
    fits = [headroom(request, forecast) >= 0 for _, forecast in tried]
    best = recommended_index(fits)
    compared, left_out = _other_methods(request, evaluator, progress) if request.compare_methods else ([], [])
    candidates = tuple(
        candidate_of(request, plan, forecast, recommended=index == best and fits[best])
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
    plan, forecast = tried[best]
    notes = _left_in_16_bits(plan, forecast, evaluator)
    if not fits[best]:
        squeezed = next(_squeezed(tried, evaluator), None)
        if squeezed is None or not request.allow_cache_release:
            return Answer(result, None, refusal(request, tried, evaluator, progress, squeezed), notes)
        plan, forecast, releases = squeezed
        notes = (*notes, f"It does not fit; {releases_in_words(releases)}.")
        planned = with_prediction(plan, evaluator.every_block(plan, forecast), request.samples)
        return Answer(result, with_releases(planned, releases), None, notes)
    progress("forecasting every block of the recommended partition")
    planned = with_prediction(plan, evaluator.every_block(plan, forecast), request.samples)
    return Answer(result, with_traffic(planned, evaluator), None, notes)


def _squeezed(tried: Sequence[tuple[Plan, PlanForecast]], evaluator: Evaluator) -> Iterator[Squeezed]:
    """Of plans that do not fit those that run all the same because torch gives back cached segments, best first."""
    for plan, forecast in tried:
        releases = evaluator.cache_releases(plan, forecast)
        if releases is not None:
            yield Squeezed(plan, forecast, releases)


def _left_in_16_bits(plan: Plan, forecast: PlanForecast, evaluator: Evaluator) -> tuple[str, ...]:
    """Of a method that quantizes, a sentence on weights of layers that its library leaves as they are, if they count.

    Its library knows linear layers alone: not a model's own class of them, nor experts that are fused in one tensor.
    """
    in_layers = [info for info in evaluator.tree.parameters if evaluator.tree.layer_of(info.name)]
    entries = sum(math.prod(info.shape) for info in in_layers)
    if not method_of(plan.method).quantizes or entries - forecast.quantized_entries < WORTH_SAYING * entries:
        return ()
    left = unquantized_weights(plan, evaluator.tree)
    total = format_bytes(sum(left.values()) * ELEMENT_BYTES[plan.training.dtype])
    *others, last = list(left)[:MOST_NAMED]
    named = f"{', '.join(others)} and {last}" if others else last
    note = (
        f"{plan.method} leaves {total} of the layers' weights in {plan.training.dtype}, which its library does not "
        f"quantize: {named}{'' if len(left) <= MOST_NAMED else ', among others'}."
    )
    return (note,)


def _rehearse_ahead(request: Request, asked_for: Sequence[Strategy], evaluator: Evaluator, progress: Progress) -> None:
    """What the search is going to ask for if the fastest setting fits, on all workers at a time."""
    fastest = settings_of(request, evaluator.tree)[0]
    progress(f"rehearsing {', '.join(asked_for)} blocks, {in_words(fastest)}")
    plans = [staged_plan(request, strategy, fastest, evaluator.tree) for strategy in asked_for]
    plans = [plan for plan in plans if method_of(plan.method).trains_one_block]
    largest = [(plan, evaluator.decisive(plan)[0]) for plan in plans]
    in_the_middle = [(plan, len(plan.partition.blocks) // 2) for plan in plans[:1]]  # these answer for most others
    evaluator.prepare([*largest, *in_the_middle])
    limit = request.target.usable_bytes - request.target.outside_bytes
    promising = [plan for plan, index in largest if evaluator.peaks(plan, index).peak_allocated_bytes <= limit]
    decisive = [(plan, index) for plan in promising for index in evaluator.decisive(plan)]
    recommended = [(plan, index) for plan in promising[:1] for index in range(len(plan.partition.blocks))]
    evaluator.prepare([*decisive, *recommended])


def _with_enough_gpus(request: Request, evaluator: Evaluator, progress: Progress) -> Request:
    """The request for the fewest cards, or the fewest of one copy, on which it fits, if it leaves their number open."""

    def on(**cards: object) -> Request:
        return replace(request, target=with_nccl(request.target.model_copy(update=cards)))

    def fits(asked: Request) -> bool:
        progress(f"trying {asked.target.shards} cards")
        kinds = strategies(request.method, request.partition)  # the first is the coarsest: fewest blocks to look at
        return any(fits_at_its_leanest(asked, strategy, evaluator) for strategy in kinds)

    def of_number(cards: int) -> Request:
        """One card alone needs nothing that joins cards, and is trained on without."""
        return on(num_gpus=cards) if cards > 1 else on(num_gpus=1, engine="single", offload="none")

    if request.find_num_gpus:
        guess = _guessed_gpus(request, evaluator, of_number)
        return of_number(smallest_number(lambda cards: fits(of_number(cards)), guess) or MOST_GPUS)
    if request.find_shard_size:
        *fewer, _ = shard_sizes(request.target.num_gpus, request.target.gpus_per_node)
        return next(filter(fits, (on(shard_size=size) for size in fewer)), on(shard_size=None))
    return on()


def _guessed_gpus(request: Request, evaluator: Evaluator, of_number: Callable[[int], Request]) -> int:
    """Where to begin looking for the fewest GPUs: 1 where one could hold the weights."""
    target = request.target
    weights = request.spec.parameters * ELEMENT_BYTES[request.dtype]
    least = -(-weights // max(target.usable_bytes - target.outside_bytes, 1))
    if least <= 1 or least > MOST_GPUS // 2:
        return 1

    def needed(strategy: Strategy, number: int) -> int:
        asked = of_number(number)
        leanest = settings_of(asked, evaluator.tree)[-1]
        return evaluator.device_bytes_of_largest(staged_plan(asked, strategy, leanest, evaluator.tree))

    finest = strategies(request.method, request.partition)[-1]
    return guessed_number(partial(needed, finest), target.usable_bytes, least)


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
                    candidate = first_that_fits(other, strategy, evaluator, progress)
                    if headroom(other, candidate[1]) >= 0:
                        break
            found.append(candidate)
        except BadamError as error:  # the others can still be compared
            left_out.append((str(method), error.message))
    return found, left_out

"""Why nothing fits, and what would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from badam.errors import DoesNotFit
from badam.plan import Plan, Target
from badam.training.build import model_config
from badam.training.tasks import TRAINED_HERE, input_positions
from badam.units import format_bytes
from badam.vocabulary import ELEMENT_BYTES
from badam_planner.rehearsal.evaluator import Evaluator, PlanForecast
from badam_planner.search.request import Request, batch_in_words
from badam_planner.search.settings import MemorySetting, SmallerBatch, smaller_batch, strategies
from badam_planner.search.trial import Progress, first_that_fits, fits_at_its_leanest, headroom, in_words


class Squeezed(NamedTuple):
    """A plan that does not fit and would run, with how often per step torch gives back its cached segments for that."""

    plan: Plan
    forecast: PlanForecast
    releases_per_step: float


def releases_in_words(per_step: float) -> str:
    """How often a plan gives back cached segments, as the end of a sentence."""
    often = f"{per_step:.2f} times per step" if per_step else "in its first steps"
    return f"it runs only because torch, out of memory, gives back its cached segments and tries again, {often}"


def refusal(
    request: Request,
    tried: Sequence[tuple[Plan, PlanForecast]],
    evaluator: Evaluator,
    progress: Progress,
    squeezed: Squeezed | None = None,
) -> DoesNotFit:
    """Why nothing fits, and the mildest change that would make it fit.

    Args:
        request: what was asked.
        tried: of each partition the leanest plan.
        evaluator: for what would fit.
        progress: is told what is tried.
        squeezed: the best of these that would run all the same.
    """
    plan, forecast = min(tried, key=lambda pair: pair[1].worst.peak_device_bytes)
    worst, training = forecast.worst, plan.training
    setting = MemorySetting(training.checkpointing, training.loss, plan.target.expandable_segments)
    category, size = max(worst.by_category.items(), key=lambda item: item[1])
    message = (
        f"{request.spec.id} needs {format_bytes(worst.peak_device_bytes)} at its leanest "
        f"({plan.partition.strategy} blocks, {in_words(setting)}, "
        f"batch {batch_in_words(request)}{_cut_in_words(request.target)}), {request.target.gpu} offers "
        f"{format_bytes(request.target.usable_bytes)}: {format_bytes(-headroom(request, forecast))} too much. "
        f"The largest part is {category}, {format_bytes(size)}, at the peak in {worst.peak_phase}."
    )
    if squeezed is not None:
        way = f"With {squeezed.plan.partition.strategy} blocks {releases_in_words(squeezed.releases_per_step)}"
        message = f"{message} {way}: --allow-cache-release plans that."
    options = _what_would_fit(request, evaluator, progress)
    if options is None and request.method != "badam":
        options = _what_would_fit(replace(request, method="badam"), evaluator, progress)
        options = options and f"--method badam {options}"
    if options is not None:
        return DoesNotFit(message, advice=f"This would fit: {options}")
    shards = request.target.shards
    weights = format_bytes(-(-request.spec.parameters * ELEMENT_BYTES[request.dtype] // shards))
    share = " on each card" if shards > 1 else ""
    return DoesNotFit(
        message,
        advice=f"No batch size, length or partition makes it fit: the weights alone take {weights}{share}. "
        f"{_beyond_one_card(request)}",
    )


def _beyond_one_card(request: Request) -> str:
    """What is left where no option makes the request fit on the cards that it is for."""
    target = request.target
    if target.shards > 1:
        more = "" if request.find_num_gpus else ", more cards (--num-gpus auto)"
        return f"Choose a larger card{more} or a smaller model."
    if target.gpu == "cpu" or request.spec.task not in TRAINED_HERE:
        return "Choose a larger card or a smaller model."
    method = "" if request.method == "badam" else "--method badam "
    options = f"{method}--engine fsdp2 --num-gpus auto"
    return f"Shard it over several cards with {options}, or choose a larger card or a smaller model."


def _cut_in_words(target: Target) -> str:
    return f", cut over {target.shards} cards" if target.shards > 1 else ""


def _what_would_fit(request: Request, evaluator: Evaluator, progress: Progress) -> str | None:
    """The options of the mildest change with which the request fits, as the user would type them."""
    fixed = input_positions(model_config(request.spec), request.spec.task) is not None
    sizes = list(smaller_batch(request.batch_size, request.seq_len, **({"shortest": request.seq_len} if fixed else {})))
    kinds = strategies(request.method, "auto")

    def resized(size: SmallerBatch) -> Request:
        # What is not said of the decoder's length follows the encoder's, in the advised command as here.
        decoder_len = size.seq_len if request.decoder_len == request.seq_len else request.decoder_len
        smaller = replace(request, batch_size=size.batch_size, seq_len=size.seq_len, decoder_len=decoder_len)
        progress(f"trying batch {batch_in_words(smaller)}")
        return replace(smaller, checkpointing="auto", loss="auto", expandable_segments="auto")

    if not any(fits_at_its_leanest(resized(sizes[-1]), strategy, evaluator) for strategy in reversed(kinds)):
        return None
    for size in sizes:
        for strategy in kinds:
            smaller = resized(size)
            if fits_at_its_leanest(smaller, strategy, evaluator):
                plan, _ = first_that_fits(smaller, strategy, evaluator, progress)
                choices = [f"--checkpointing {plan.training.checkpointing}", f"--loss {plan.training.loss}"]
                if plan.target.expandable_segments and request.expandable_segments == "off":
                    choices.append("--expandable-segments on")
                partition = () if strategy == "full" else (f"--partition {strategy}",)
                return " ".join((*size.options, *partition, *choices))
    return None

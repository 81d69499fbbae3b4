"""Planning from Python, with the options of badam-plan: the fields of ``badam_planner.search.question.Question``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from badam.errors import DoesNotFit
from badam.plan import Plan
from badam.vocabulary import ModelSource
from badam_planner.search.answers import answer
from badam_planner.search.question import Question, wrong_values_refused
from badam_planner.search.result import Answer, SearchResult, SizeMap

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Progress = Callable[[str], None]


def plan(
    model: str | PretrainedConfig | PreTrainedModel, *, progress: Progress = lambda _text: None, **options: Any
) -> Plan:
    """The plan to recommend for training ``model``, with what is predicted of it.

    Args:
        model: catalogue name, Hub id, directory or config.json, or a configuration or model of transformers, of which
            the configuration and the class are taken and no weights.
        progress: is told what is being done.
        options: fields of :class:`badam_planner.Question`, such as ``gpu="rtx3090"``, ``method="lora"`` or
            ``batch_size=4``; defaults are those of the command.

    Raises:
        DoesNotFit: if nothing fits, with what would.
        InputError: if model or device cannot be found, or an option is wrong or does not go with others.
    """
    found = _answer(model, progress, options)
    if found.plan is None:
        assert found.refusal is not None  # without a plan there is a reason
        raise DoesNotFit(found.refusal.message, advice=found.refusal.advice)
    return found.plan


def compare_methods(
    model: str | PretrainedConfig | PreTrainedModel, *, progress: Progress = lambda _text: None, **options: Any
) -> SearchResult:
    """What every method needs for training ``model``; those that cannot be planned are in ``left_out``, with why.

    Args:
        model, progress, options: as for :func:`plan`; the candidates of ``method`` come first.

    Raises:
        InputError: as :func:`plan`.
    """
    return _answer(model, progress, {**options, "compare_methods": True}).result


def sizes(plan: Plan, *, progress: Progress = lambda _text: None) -> SizeMap:
    """What fits at batch sizes and lengths around those of ``plan``, everything else as it is there.

    Raises:
        InputError: if the model of the plan cannot be rehearsed.
    """
    from badam_planner.rehearsal.evaluator import Evaluator
    from badam_planner.rehearsal.model_tree import inspect_model
    from badam_planner.search.size_map import map_sizes

    return map_sizes(plan, Evaluator(inspect_model(plan.model, plan.training.attention)), progress)


def _answer(model: str | PretrainedConfig | PreTrainedModel, progress: Progress, options: dict[str, Any]) -> Answer:
    source = None if isinstance(model, str) else _source_of(model)
    name = str(model) if source is None else source[0]
    with wrong_values_refused():
        question = Question(model=name, **options)
    return answer(question, source=source, command="badam_planner", progress=progress)


def _source_of(model: PretrainedConfig | PreTrainedModel) -> tuple[str, ModelSource, dict[str, Any]]:
    """Id, kind and facts of a configuration, or of a model's configuration and class."""
    config = getattr(model, "config", model)
    facts = config.to_dict()
    if config is not model:
        facts["architectures"] = [type(model).__name__]
    return str(getattr(config, "name_or_path", "") or facts["model_type"]), "config", facts

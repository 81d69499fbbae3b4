"""From a configuration that was found to the specification of a plan's model; loads torch to count its parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from badam.errors import BadamError, InputError, in_one_line, missing_library
from badam.plan import ModelSpec, config_digest
from badam.training.build import choose_attention
from badam.training.tasks import CLASSIFICATIONS, TASKS, default_task
from badam.training.weights import unquantized
from badam.vocabulary import ModelSource, Task
from badam_planner.rehearsal.model_tree import inspect_model
from badam_planner.sources.model_source import find_config


def describe_model(name: str, *, task: Task | None = None, labels: int | None = None) -> ModelSpec:
    """The specification of the model that ``name`` means; its parameters are counted on its module tree.

    Args:
        name: what to look up.
        task, labels: see :func:`specify`.

    Raises:
        InputError: as :func:`badam_planner.sources.model_source.find_config`, and if transformers cannot build the
            model.
    """
    return specify(*find_config(name), task=task, labels=labels)


def specify(
    model_id: str, source: ModelSource, config: dict[str, Any], *, task: Task | None = None, labels: int | None = None
) -> ModelSpec:
    """The specification of a model whose configuration was found, with plain weights whatever its checkpoint has.

    Args:
        model_id, source, config: as :func:`badam_planner.sources.model_source.find_config` returns them.
        task: what to train the model for; None is what its configuration says.
        labels: classes to tell apart; None leaves the configuration's, which are two if it names none.

    Raises:
        InputError: if transformers cannot build the model, or classes are given for another task.
    """
    config = unquantized(config)
    task = task or default_task(config)
    if labels is not None:
        if task not in CLASSIFICATIONS:
            raise InputError(
                f"{model_id} is planned for {TASKS[task].words}, which has no {labels} classes.",
                advice="Add --task sequence-classification.",
            )
        named = ("id2label", "label2id")
        config = {**{key: value for key, value in config.items() if key not in named}, "num_labels": labels}
    spec = ModelSpec(
        id=model_id,
        source=source,
        config=config,
        config_digest=config_digest(config),
        task=task,
        parameters=1,
    )
    with explaining(model_id):
        return spec.model_copy(update={"parameters": inspect_model(spec, choose_attention(spec)).entries})


@contextmanager
def explaining(model_id: str) -> Iterator[None]:
    """Turn what a model's own code raises into a sentence: its configuration, or the size asked for, is at fault.

    Raises:
        InputError: in place of any exception that is not already one of ours.
    """
    try:
        yield
    except BadamError:
        raise
    except ImportError as error:
        raise missing_library(model_id, error) from error
    except Exception as error:  # a model may refuse its facts with any error there is
        raise InputError(
            f"The code of {model_id} fails with this configuration and this request: {in_one_line(error)}",
            advice="BADAM_TRACEBACK=1 in the environment shows where.",
        ) from error

"""What may be asked, in which words it is refused, and that command and Python ask the same by default."""

from __future__ import annotations

from dataclasses import MISSING, FrozenInstanceError, fields, replace
from typing import Any

import pytest
import typer.main

from badam.errors import InputError
from badam.plan import MethodOptions
from badam_cli.plan import app
from badam_planner.search.question import Question, check_gpus, wrong_values_refused

WRONG: dict[str, Any] = {
    "batch_size": 0,
    "grad_accum": -1,
    "seq_len": 0,
    "num_labels": 1,
    "method": "sgd",
    "partition": "ratio",
    "checkpointing": "list",
    "dtype": "fp16",
    "engine": "mpi",
    "num_gpus": "many",
    "shard_size": 0,
    "gpus_per_node": 0,
    "learning_rate": float("nan"),
    "seed": -1,
    "switch_every": 1.5,
    "gpu_memory_bytes": 0,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_refused_in_a_sentence_that_names_the_option(name: str) -> None:
    with (
        pytest.raises(InputError, match=rf"^--{name.replace('_', '-')}: .+; found ") as refused,
        wrong_values_refused(),
    ):
        Question(model="m", **{name: WRONG[name]})
    assert "\n" not in str(refused.value)


def test_a_wrong_option_of_a_method_is_named_as_it_is_typed() -> None:
    with pytest.raises(InputError, match=r"^--update-ratio: .*greater than 0; found 0"), wrong_values_refused():
        Question(model="m", options=MethodOptions(update_ratio=0))


def test_what_is_not_an_option_is_refused() -> None:
    with pytest.raises(InputError, match=r"^--batch: "), wrong_values_refused():
        Question(model="m", batch=2)  # type: ignore[call-arg]


def test_a_question_is_frozen_and_a_changed_one_is_validated_again() -> None:
    question = Question(model="m")
    with pytest.raises(FrozenInstanceError):
        question.batch_size = 2  # type: ignore[misc]
    assert replace(question, batch_size=2).batch_size == 2
    with pytest.raises(InputError, match="--batch-size"), wrong_values_refused():
        replace(question, batch_size=0)


def test_a_number_that_goes_with_no_engine_is_refused() -> None:
    check_gpus(Question(model="m", num_gpus=4, engine="fsdp2", shard_size=2))
    with pytest.raises(InputError, match="divided into groups of 3"):
        check_gpus(Question(model="m", num_gpus=4, engine="fsdp2", shard_size=3))


def test_the_command_and_python_ask_the_same_where_nothing_is_said() -> None:
    options = {option.name: option.default for option in typer.main.get_command(app).params}
    spelled: dict[str, Any] = {"switch_every": "auto", "num_gpus": "1"}
    renamed = {"active_modules": "active_module", "gpu_memory_bytes": "gpu_memory"}
    for field in fields(Question):
        if field.name == "options":
            for name in ("update_ratio", "rank", "alpha", "sampled_layers"):
                assert getattr(MethodOptions(), name) == options[name]
        elif field.default is not MISSING:
            given = options[renamed.get(field.name, field.name)]
            assert given in (spelled.get(field.name, field.default), field.default or None), field.name

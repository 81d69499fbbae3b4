"""One description per training method; the trainer runs it and the planner rehearses it.

A description says how to prepare the model, how to build the optimizer, and what differs in the training step. It is
imported when it is asked for: some need libraries that others do not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, get_args

from badam.errors import InputError, near_matches
from badam.vocabulary import Method

if TYPE_CHECKING:
    from badam.training.methods.base import TrainingMethod

_HOMES: dict[str, str] = {
    "badam": "blocks.BlockCoordinate",
    "badam-ratio": "ratio.Ratio",
    "adam": "full.FullAdam",
    "lora": "lora.Lora",
    "qlora": "qlora.QLora",
    "lomo": "lomo.LowMemory",
    "adalomo": "lomo.AdaptiveLowMemory",
    "galore": "galore.GaLore",
    "lisa": "lisa.Lisa",
    "hift": "hift.Hift",
    "mezo": "mezo.Mezo",
}
"""Module and class by method; every name in badam.plan.Method has one."""

METHODS: tuple[Method, ...] = get_args(Method)


def method_of(name: str) -> TrainingMethod:
    """The description of a method.

    Raises:
        InputError: if there is no method of this name.
    """
    if name not in _HOMES:
        close = ", ".join(near_matches(name, _HOMES) or _HOMES)
        raise InputError(f"There is no training method {name!r}.", advice=f"Choose {close}.")
    module, _, kind = _HOMES[name].partition(".")
    found: TrainingMethod = getattr(import_module(f"{__name__}.{module}"), kind)()
    return found

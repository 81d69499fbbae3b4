"""badam 1.4's names, from a list made of its package: each is there, or docs/migrating.md says what replaces it."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import badam
from badam import BAdamCallback, BlockOptimizer, BlockOptimizerRatio

ROOT = Path(__file__).parent.parent.parent
NAMES: dict[str, dict[str, dict[str, Any]]] = json.loads(
    (ROOT / "tests" / "snapshots" / "badam_1_4.json").read_text(encoding="utf-8")
)
NEVER_CHANGED = {"[]": (), "defaultdict(lambda: None)": None}
"""Defaults that Python would share between calls, and what stands for them."""


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    """An object of each class, as an attribute may be made by the constructor."""
    layers = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])})
    by_blocks = BlockOptimizer(
        torch.optim.AdamW(layers.parameters()), list(layers.named_parameters()), verbose=0, log_fn=print
    )
    by_windows = BlockOptimizerRatio(
        list(nn.Linear(4, 4).parameters()), list(nn.Linear(4, 4).named_parameters()), verbose=0
    )
    return {"BlockOptimizer": by_blocks, "BlockOptimizerRatio": by_windows, "BAdamCallback": BAdamCallback()}


def missing(built: dict[str, Any]) -> Iterator[str]:
    """What 1.4 has and this version has not, or not with the same default, as docs/migrating.md writes it."""
    for path, names in NAMES.items():
        module = importlib.import_module(path)
        for name, known in names.items():
            here = getattr(module, name, None)
            if here is None:
                yield f"{path}.{name}"
                continue
            if "parameters" in known and not takes(here, known["parameters"]):
                yield f"{path}.{name}"
            for method, parameters in known.get("methods", {}).items():
                if not hasattr(here, method):
                    yield f"{name}.{method}"
                elif not takes(getattr(built[name], method), parameters):
                    yield f"{name}.{method}({', '.join(f'{key}={value}' for key, value in parameters.items())})"
            for attribute in known.get("attributes", ()):
                if not hasattr(built[name], attribute):
                    yield f"{name}.{attribute}"


def takes(function: Any, parameters: dict[str, str | None]) -> bool:
    """Whether ``function`` begins with these parameters, in their order and with their defaults."""
    here = [each for each in inspect.signature(function).parameters.values() if each.kind is each.POSITIONAL_OR_KEYWORD]
    return len(here) >= len(parameters) and all(
        parameter.name == name and parameter.default == (inspect.Parameter.empty if text is None else value_of(text))
        for parameter, (name, text) in zip(here, parameters.items(), strict=False)
    )


def value_of(text: str) -> Any:
    return NEVER_CHANGED[text] if text in NEVER_CHANGED else ast.literal_eval(text)


def listed() -> dict[str, str]:
    """The table of names that are gone, by name."""
    text = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    table = text.partition("## Names that are gone")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| `")]
    return {name: instead for names, instead in rows for name in re.findall(r"`([^`]+)`", names)}


def assignable(built: dict[str, Any], name: str) -> bool:
    """Whether an attribute of 1.4 that is there can still be assigned."""
    owner, attribute = name.split(".")
    kind = getattr(type(built[owner]), attribute, None)
    return not isinstance(kind, property) or kind.fset is not None


def test_a_name_of_1_4_is_there_or_listed_with_what_replaces_it(built: dict[str, Any]) -> None:
    gone = set(missing(built))
    attributes = {
        f"{name}.{attribute}"
        for names in NAMES.values()
        for name, known in names.items()
        for attribute in known.get("attributes", ())
    }
    fixed = {name for name in attributes - gone if not assignable(built, name)}
    assert gone | fixed == set(listed())
    assert all(instead.strip() for instead in listed().values())


@pytest.mark.parametrize("path", ["badam.utils", "badam.block_optim"])
def test_the_modules_of_1_4_are_import_paths_and_attributes_of_the_package(path: str) -> None:
    module = importlib.import_module(path)
    assert getattr(badam, path.removeprefix("badam.")) is module
    for name in NAMES["badam"]:
        if hasattr(module, name):
            assert getattr(module, name) is getattr(badam, name)


def test_the_line_of_the_readme_of_1_4_works_in_a_fresh_interpreter() -> None:
    code = "from badam.utils import BAdamCallback; import badam; badam.block_optim.BlockOptimizer"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

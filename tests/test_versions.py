"""The lowest versions that are declared are those that ``make test-oldest`` installs."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def test_declared_floors_are_the_versions_of_the_oldest_environment() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [
        *project["dependencies"],
        *(one for name in ("train", "zero3") for one in project["optional-dependencies"][name]),
    ]
    floors = {}
    for requirement in map(Requirement, declared):
        (floor,) = (Version(each.version) for each in requirement.specifier if each.operator == ">=")
        floors[canonicalize_name(requirement.name)] = floor
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pins = {}
    for requirement in (Requirement(line) for line in lines if line and not line.startswith("#")):
        (pin,) = (Version(each.version) for each in requirement.specifier)
        pins[canonicalize_name(requirement.name)] = pin
    assert set(floors) == set(pins)
    for name, floor in floors.items():
        assert pins[name].release[: len(floor.release)] == floor.release, name

"""What must stay true of the whole: who imports whom, what loads fast, and which names and options people rely on.

A snapshot that differs on purpose is rewritten with ``UPDATE_SNAPSHOTS=1 pytest tests/test_architecture.py``.
"""

from __future__ import annotations

import ast
import configparser
import importlib
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Collection
from enum import Enum
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, get_type_hints

import grimp
import pytest
import typer.main

from badam.plan import Plan
from badam.profiling.record import MeasuredRun

ROOT = Path(__file__).parent.parent
PACKAGES = {"badam": ROOT / "badam", "badam_planner": ROOT / "badam_planner", "badam_cli": ROOT / "cli"}
SNAPSHOTS = Path(__file__).parent / "snapshots"
COMMANDS = {"badam-plan": "badam_cli.plan", "badam-train": "badam_cli.train", "badam-report": "badam_cli.report"}
HEAVY = {"accelerate", "datasets", "numpy", "peft", "pynvml", "torch", "transformers", "trl"}


MAY_IMPORT = {
    "torch": ("badam", "badam_planner.rehearsal", "badam_planner.search"),
    "transformers": ("badam", "badam_planner.rehearsal", "badam_planner.search", "badam_planner.interface"),
    "trl": ("badam.training",),
    "datasets": ("badam.training",),
    "accelerate": ("badam",),
    "pynvml": ("badam.profiling", "badam_planner.sources.nvml"),
    "psutil": ("badam_planner.sources.host",),
    "platformdirs": ("badam.files",),
    "rich": ("badam.training", "badam_planner.report", "badam_cli"),
    "typer": ("badam_cli",),
    "ijson": ("badam.training.data.files",),
    "jinja2": ("badam_planner.report.html", "badam.training.data.chat"),
    "plotly": ("badam_planner.report.html",),
}
"""Which packages may import a library directly; for what pure modules must not even reach, see .importlinter."""


@cache
def import_graph() -> grimp.ImportGraph:
    return grimp.build_graph("badam", "badam_planner", "badam_cli", include_external_packages=True, cache_dir=None)


def test_the_import_contracts_hold() -> None:
    result = subprocess.run(["lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True, env=environment())
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_package_of_the_planner_stands_on_a_floor() -> None:
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter")
    floors = set(contracts["importlinter:contract:floors"]["layers"].split())
    packages = {f"badam_planner.{marker.parent.name}" for marker in (ROOT / "badam_planner").glob("*/__init__.py")}
    assert packages == floors


def test_nothing_imports_in_a_circle_at_any_time() -> None:
    """In a function, for a type checker only, or by name: an import is an import."""
    assert circle_in(sources_of(PACKAGES)) == ()


@pytest.mark.parametrize(
    "lazy",
    [
        "def f():\n    from a.two import x",
        "def f():\n    import a.two",
        "if TYPE_CHECKING:\n    from a import two",
        "import importlib\nHOMES = {'x': 'a.two'}",
    ],
)
def test_a_circle_is_found_however_late_it_closes(lazy: str) -> None:
    straight = {"a": "", "a.one": lazy, "a.two": ""}
    assert circle_in(straight) == ()
    assert set(circle_in({**straight, "a.two": "from a.one import f"})) == {"a.one", "a.two"}


def sources_of(packages: dict[str, Path]) -> dict[str, str]:
    """The source of every module by its dotted name."""
    sources = {}
    for package, directory in packages.items():
        for path in directory.rglob("*.py"):
            parts = [package, *path.relative_to(directory).with_suffix("").parts]
            sources[".".join(parts).removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return sources


def circle_in(sources: dict[str, str]) -> tuple[str, ...]:
    """Modules each of which imports another one of them, in order; none if there is no circle."""
    graph = {module: imports_of(source, sources.keys()) - {module} for module, source in sources.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return tuple(error.args[1])
    return ()


def imports_of(source: str, modules: Collection[str]) -> set[str]:
    """Those of ``modules`` that a module imports anywhere in it; if it imports by name, every string may be one."""
    imported: set[str] = set()
    strings: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            imported |= {name if name in modules else str(node.module) for name in inside}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.add(node.value)
    return {name for name in imported | (strings if "importlib" in imported else set()) if name in modules}


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_a_library_is_imported_only_where_it_belongs(library: str) -> None:
    graph = import_graph()
    importers = graph.find_modules_that_directly_import(library) if library in graph.modules else set()
    allowed = MAY_IMPORT[library]
    strays = {name for name in importers if not any(name == home or name.startswith(f"{home}.") for home in allowed)}
    assert strays == set()


def test_every_package_is_shipped_and_typed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    renamed = {directory: package for package, directory in settings["package-dir"].items()}
    found = set()
    for top in ("badam", "badam_planner", "cli", "profiles"):
        assert (ROOT / top / "py.typed").is_file()
        for marker in (ROOT / top).rglob("__init__.py"):
            parts = marker.parent.relative_to(ROOT).parts
            found.add(".".join([renamed.get(parts[0], parts[0]), *parts[1:]]))
    assert set(settings["packages"]) == found


@pytest.mark.parametrize("module", ["badam", "badam.plan", "badam.profiling.record", "badam_planner.accuracy.compare"])
def test_reading_a_record_loads_nothing_heavy(module: str) -> None:
    assert loaded_by(f"import {module}") & (HEAVY | {"rich", "typer"}) == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_nothing_heavy(command: str) -> None:
    code = f"""if True:
        import sys
        from {COMMANDS[command]} import main
        sys.argv = [{command!r}, "--help"]
        try:
            main()
        except SystemExit as end:
            assert not end.code, end.code
    """
    assert loaded_by(code) & HEAVY == set()


def test_the_public_names_are_the_ones_people_import() -> None:
    names = [
        f"{package}.{name}"
        for package in ("badam", "badam_planner")
        for name in importlib.import_module(package).__all__
    ]
    assert_snapshot("public_names.json", sorted(names))


@pytest.mark.parametrize(("name", "record"), [("plan", Plan), ("measured", MeasuredRun)])
def test_the_schema_of_a_file_on_disk_does_not_change_unnoticed(name: str, record: type[Plan | MeasuredRun]) -> None:
    assert_snapshot(f"{name}.schema.json", without_prose(record.model_json_schema()))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_of_a_command_do_not_change_unnoticed(command: str) -> None:
    app = importlib.import_module(COMMANDS[command]).app
    function = app.registered_commands[0].callback
    kinds = get_type_hints(function)
    parameters = [each for each in typer.main.get_command(app).params if each.name in kinds]  # the rest is typer's own
    assert_snapshot(f"{command}.options.json", {name_of(each): describe(each, kinds[each.name]) for each in parameters})


def name_of(parameter: Any) -> str:
    return "/".join([*parameter.opts, *parameter.secondary_opts])


def describe(parameter: Any, kind: Any) -> dict[str, Any]:
    """What a caller of the command relies on: whether it must be given, its kind, choices and default."""
    described: dict[str, Any] = {"required": bool(parameter.required)}
    if isinstance(kind, type) and issubclass(kind, Enum):
        described["choices"] = [str(choice.value) for choice in kind]
    else:
        described["kind"] = kind.__name__ if isinstance(kind, type) else str(kind)
    default = parameter.default.value if isinstance(parameter.default, Enum) else parameter.default
    if isinstance(default, (str, int, float)):
        described["default"] = default
    return described


def without_prose(schema: Any) -> Any:
    """A JSON schema without titles and descriptions, which may change freely."""
    if isinstance(schema, list):
        return [without_prose(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    prose = {key for key in ("title", "description") if isinstance(schema.get(key), str)}
    return {key: without_prose(value) for key, value in schema.items() if key not in prose}


def assert_snapshot(name: str, value: Any) -> None:
    path = SNAPSHOTS / name
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"{path} is missing; write it with UPDATE_SNAPSHOTS=1"
    assert text == path.read_text(encoding="utf-8"), f"differs from {path}; on purpose: UPDATE_SNAPSHOTS=1"


def loaded_by(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after running ``code``."""
    report = 'import sys; print("\\nLOADED", *sorted({name.split(".")[0] for name in sys.modules}))'
    result = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.rpartition("LOADED")[2].split())


def environment() -> dict[str, str]:
    """This process's environment with the interpreter's own directory first on the path, where its tools are."""
    return {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}

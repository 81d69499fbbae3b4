"""The wheel is what people install: built here, installed into an empty directory, run from outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel. The sources are linked into a scratch directory: setuptools writes beside what it builds."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE", "badam", "badam_planner", "cli", "profiles"):
        (source / name).symlink_to(ROOT / name)
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist), str(source)], cwd=source)
    (built,) = dist.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel)])
    return target


def test_the_wheel_is_called_badam_so_that_it_replaces_the_older_one(wheel: Path) -> None:
    assert wheel.name == "badam-2.0.0.dev0-py3-none-any.whl"


def test_the_wheel_holds_the_packages_and_their_data_and_nothing_else(wheel: Path) -> None:
    names = [Path(name) for name in zipfile.ZipFile(wheel).namelist()]
    packages = {name.parts[0] for name in names} - {"badam-2.0.0.dev0.dist-info"}
    assert packages == {"badam", "badam_planner", "badam_cli", "badam_profiles"}
    read = {Path("gpus.json"), *(Path("models") / path.name for path in (ROOT / "profiles/models").iterdir())}
    shipped = {name.relative_to("badam_profiles") for name in names if name.suffix == ".json"}
    assert shipped == read
    assert {path.relative_to(ROOT / "profiles") for path in (ROOT / "profiles").rglob("*.json")} == read
    pages = {name.name for name in names if name.parent == Path("badam_planner/report/html") and name.suffix != ".py"}
    assert pages == {"page.html.jinja", "page.css", "page.js"}
    assert {Path(package) / "py.typed" for package in packages} <= set(names)


def test_a_catalogue_record_is_read_from_the_installed_wheel(installed: Path, tmp_path: Path) -> None:
    code = """if True:
        import badam_planner, badam_profiles
        from badam_planner.sources.catalogue import find_gpu, find_model
        print(badam_planner.__file__, badam_profiles.__file__)
        print(find_model("meta-llama/Llama-2-7b-hf").parameters, find_gpu("RTX 3090").id)
    """
    output = run([sys.executable, "-c", code], cwd=tmp_path, installed=installed)
    files, facts = output.splitlines()
    assert all(file.startswith(str(installed)) for file in files.split())
    assert facts == "6738415616 rtx3090"


@pytest.mark.parametrize("command", ["badam-plan", "badam-train", "badam-report"])
def test_a_command_of_the_installed_wheel_shows_its_help(installed: Path, tmp_path: Path, command: str) -> None:
    script = installed / "bin" / command
    assert f"Usage: {command}" in run([sys.executable, str(script), "--help"], cwd=tmp_path, installed=installed)


def run(command: list[str], cwd: Path | None = None, installed: Path | None = None) -> str:
    """The command's stdout; ``installed`` comes before whatever this interpreter has of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["NO_COLOR"] = "1"
    if installed is not None:
        environment["PYTHONPATH"] = str(installed)
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout

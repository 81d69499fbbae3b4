"""Links within the documentation lead somewhere: to a file of the repository, and to a heading of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")])


def anchors(page: Path) -> set[str]:
    """What links to the page's headings look like, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            dead.append(target)
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_benchmarks_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    files = re.findall(r"`([a-z0-9_.\-/]+/[a-z0-9_.\-]+\.(?:py|json|md))`", text)
    modules = re.findall(r"python -m (benchmarks(?:\.[a-z0-9_]+)+)", text)
    paths = [module.replace(".", "/") for module in modules]
    named = {*files, *(f"{path}/__main__.py" if (ROOT / path).is_dir() else f"{path}.py" for path in paths)}
    assert {name for name in named if not ((ROOT / name).exists() or (page.parent / name).exists())} == set()

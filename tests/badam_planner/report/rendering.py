"""Rendering to plain text of a fixed width, and comparison with a stored text."""

from __future__ import annotations

import io
import os
from pathlib import Path

from rich.console import Console, RenderableType

GOLDEN = Path(__file__).parent / "golden"


def render(renderable: RenderableType, width: int, *, encoding: str = "utf-8", colour: bool = False) -> str:
    """``renderable`` as text, without the spaces that pad lines to the width."""
    # The console asks its file for the encoding when it decides between block characters and letters.
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace", newline="")
    console = Console(
        file=file,
        width=width,
        color_system="truecolor" if colour else None,
        force_terminal=colour,
        legacy_windows=False,
        highlight=False,
        _environ={},
    )
    console.print(renderable)
    file.seek(0)
    return "".join(f"{line.rstrip()}\n" for line in file.read().splitlines())


def assert_golden(name: str, text: str) -> None:
    """``text`` equals the stored one; with BADAM_UPDATE_GOLDEN=1 it is stored instead, to be read before commit."""
    path = GOLDEN / name
    if os.environ.get("BADAM_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")

"""The settings of torch's allocator, which it reads once, when it is first used."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from badam.plan import Target
from badam.training.one_voice import rank_and_count
from badam_cli._app import say

SETTINGS = "PYTORCH_CUDA_ALLOC_CONF"
"""Read by all versions of torch 2, before ``PYTORCH_ALLOC_CONF``, which is the newer name."""

OPTION = "expandable_segments"


def configure_allocator(target: Target, environment: MutableMapping[str, str] = os.environ) -> None:
    """Have expandable segments used if the plan counts on them; before torch is first used.

    What the user has set stays; if it switches them off, the user is told.
    """
    if not target.expandable_segments:
        return
    given = environment.get(SETTINGS) or environment.get("PYTORCH_ALLOC_CONF", "")
    options = dict(part.strip().partition(":")[::2] for part in given.split(","))
    if OPTION not in options:
        environment[SETTINGS] = ",".join(filter(None, (given, f"{OPTION}:True")))
    elif options[OPTION].strip().lower() != "true" and rank_and_count()[0] == 0:
        say(f"The plan counts on expandable segments, which {given!r} switches off: more memory will be reserved.")

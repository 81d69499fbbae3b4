"""What an optimizer tells the person who runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed


class Messages:
    """Passes messages to the caller's function, or prints them on rank 0; says nothing at verbosity 0.

    Args:
        verbose: from which level on to speak.
        log_fn: called with each message.
    """

    def __init__(self, verbose: int, log_fn: Callable[[str], Any] | None) -> None:
        self.verbose = verbose
        self.log_fn = log_fn

    def say(self, message: str, *, verbose: int | None = None, level: int = 1) -> None:
        """Say ``message`` if the verbosity (``verbose`` if given) is at least ``level``."""
        if (self.verbose if verbose is None else verbose) < level:
            return
        if self.log_fn is not None:
            self.log_fn(message)
        elif not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            print(message)

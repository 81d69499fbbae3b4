"""What happens to records that cannot be trained on."""

from __future__ import annotations

from badam.errors import DataError
from badam.vocabulary import OnBadRow


class BadRows:
    """Refuses the first record that cannot be trained on, or leaves such records out and counts them.

    Args:
        policy: ``refuse`` or ``skip``.
    """

    def __init__(self, policy: OnBadRow = "refuse") -> None:
        self._policy = policy
        self.count = 0
        self.first: DataError | None = None

    def meet(self, error: DataError) -> None:
        """Take note of a record and what is wrong with it.

        Raises:
            DataError: the same one, if such records are refused.
        """
        if self._policy == "refuse":
            raise error
        self.count += 1
        self.first = self.first or error

    @property
    def sentence(self) -> str | None:
        """How many records were left out, and what was wrong with the first."""
        if self.first is None:
            return None
        records = "1 record was" if self.count == 1 else f"{self.count:,} records were"
        return f"{records} left out with --on-bad-row skip; the first: {self.first.message}"
